// The state_dict layout of upstream hqq 0.2.x, one layer at a time (docs/format.md, "Upstream
// format").
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "hqq/quantized_tensor.hpp"
#include "hqq/safetensors.hpp"

namespace hqq {

// Choices of the layout that a QuantizedTensor does not carry.
struct UpstreamOptions {
  // What upstream computes in: float16, bfloat16 or float32. Unset: the type of scale and zero.
  std::optional<DType> compute_dtype;
  // Store W_q under the type compute_dtype, same bytes.
  bool view_as_float = false;
};

// What the small tensors of a layer say, checked against shapes and types of the large ones.
struct UpstreamLayer {
  LayerConfig config;  // solver hqq (or minmax for optimize false), balance none
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  UpstreamOptions options;
  bool zero_scale = false;  // zero and scale come stacked in one tensor (offload_meta)
};

// Keys a layer may have, besides the zero_scale of offload_meta.
const std::vector<std::string>& upstream_keys();

// Throws std::invalid_argument when upstream's layout has no place for such a layer: column scales,
// short tail groups, a grid that its packing cannot cut.
void check_upstream_holds(const LayerConfig& config, std::int64_t out_features,
                          std::int64_t in_features, const std::string& name);

// The tensors of a layer in the order of HQQLinear.state_dict(), without bias. W_q, scale and zero
// have type and shape, but no bytes.
std::vector<std::pair<std::string, Tensor>> upstream_layout(const LayerConfig& config,
                                                            std::int64_t out_features,
                                                            std::int64_t in_features,
                                                            const std::string& name,
                                                            const UpstreamOptions& options = {});

// Fills a scale or zero of upstream_layout() from the stored one; `step` and `offset` are those of
// 8-bit metadata, else absent.
void fill_upstream_metadata(const Tensor& stored, const Tensor& step, const Tensor& offset,
                            Tensor& out);

// The tensors of a layer, all with their bytes. Codes, scale and zero keep every bit; 8-bit scales
// and zeros, which upstream no longer stores, become float32. `name` is for messages.
std::vector<std::pair<std::string, Tensor>> to_upstream(const QuantizedTensor& q,
                                                        const std::string& name,
                                                        const UpstreamOptions& options = {});

// Reads shapes, types and the small tensors; the contents of W_q, scale, zero and bias are not
// looked at. Older files without the quant_config part (channel_wise, optimize, round_zero) are
// read as well. Throws FormatError for anything upstream would not have written,
// std::invalid_argument for a layer that format 1 cannot hold.
UpstreamLayer parse_upstream(const std::map<std::string, Tensor>& tensors, const std::string& name);

// The inverse of to_upstream; `bias` is left to the caller. W_q must be aligned to its type.
QuantizedTensor from_upstream(const std::map<std::string, Tensor>& tensors,
                              const std::string& name);

}  // namespace hqq
