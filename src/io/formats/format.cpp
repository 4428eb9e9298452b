#include "src/io/formats/format.hpp"

#include <algorithm>
#include <stdexcept>

#include "hqq/error.hpp"
#include "src/base/quoted_text.hpp"

namespace hqq {

std::uint64_t SourceLayer::nbytes() const {
  std::uint64_t total = 0;
  for (const TensorInfo* info : tensors) total += info->nbytes();
  return total;
}

const std::vector<Format>& checkpoint_formats() {
  static const std::vector<Format> formats = {
      {CheckpointFormat::kHqqCpp, "hqq_cpp",
       "holds no layer in format 1 of hqq_cpp; quantize it first", &open_format1,
       &make_format1_writer},
      {CheckpointFormat::kUpstream, "upstream",
       "holds no layer of hqq: no tensor is named <layer>.W_q", &open_upstream,
       &make_upstream_writer},
  };
  return formats;
}

const Format& format_of(CheckpointFormat id) {
  for (const Format& format : checkpoint_formats()) {
    if (format.id == id) return format;
  }
  throw std::logic_error("checkpoint_formats() has no row for a CheckpointFormat");
}

std::string to_string(CheckpointFormat format) { return format_of(format).name; }

CheckpointFormat checkpoint_format_from_string(const std::string& name) {
  std::string names;
  for (const Format& format : checkpoint_formats()) {
    if (name == format.name) return format.id;
    names += (names.empty() ? "" : " or ") + quote_name(format.name);
  }
  throw_invalid("convert", "to is " + quote_name(name) + "; it must be " + names);
}

std::unique_ptr<FormatReader> open_source(const Checkpoint& source, const Format& target,
                                          const std::string& where) {
  const std::string shown = quote_text(source.path().string());
  const std::vector<Format>& formats = checkpoint_formats();
  const Format& format1 = formats.front();
  if (target.id == format1.id && is_quantized_by_us(source)) {
    throw_invalid(where, shown + " is in format 1 of hqq_cpp already");
  }
  std::string problem;
  for (const Format& format : formats) {
    if ((format.id == format1.id) == (target.id == format1.id)) continue;
    std::unique_ptr<FormatReader> reader = format.open(source, {});
    if (!reader->layers().empty()) return reader;
    problem += (problem.empty() ? " " : ", ") + std::string(format.absent);
  }
  throw_invalid(where, shown + problem);
}

}  // namespace hqq
