// The names that families of models give to embeddings, routers, experts and heads: the place for
// those of a new family. src/model/roles.cpp says what else counts.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace hqq {

// "c" and "a.b" of "a.b.c"; "" has no parent.
std::string last_component(const std::string& name);
std::string parent_of(const std::string& name);
// Whether a component is the number of an entry in a list.
bool is_number(std::string_view component);

// Whole names of layers: "transformer.wte", "model.decoder.embed_tokens.0".
bool is_embedding_name(const std::string& layer);
// "q_norm": a product of elements, for each head where it has two dimensions.
bool is_norm_name(const std::string& layer);
// "lora_A", "lora_embedding_B", "hada_w1_a": what peft calls the parts of adapters.
bool is_adapter_name(const std::string& component);
// Whether a component of the name is one.
bool is_below_adapter(const std::string& layer);
// "model.layers.0.mlp.gate", and whatever is below a router.
bool is_router_name(const std::string& layer);
// "model.layers.0.mlp.experts.gate_up_proj".
bool is_experts_name(const std::string& layer);

// "lm_head".
bool is_head_name(const std::string& layer);
// "head": of the vocabulary or of classes.
bool may_be_head_name(const std::string& layer);
// Last components.
// Modules that look like linear layers, and multiply in another way.
bool is_own_product_name(const std::string& last);
bool is_conv1d_name(const std::string& last);

// Values of "model_type": models with Transformers' Conv1D, and those whose experts do not run
// through Transformers' experts interface, which is what takes packed ones.
const std::set<std::string_view>& conv1d_model_types();
const std::set<std::string_view>& dense_experts_model_types();

}  // namespace hqq
