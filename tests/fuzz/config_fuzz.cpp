// Settings as JSON: whatever is accepted says the same again, and matches names of layers.
#include "hqq/config.hpp"
#include "src/config/config_json.hpp"
#include "tests/fuzz/fuzz_util.hpp"

using hqq::HqqConfig;
using hqq::fuzzing::accepted;
using hqq::fuzzing::require;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  HqqConfig config;
  const std::string text(hqq::fuzzing::text_of(data, size));
  if (!accepted([&] { config = HqqConfig::from_json_text(text); })) return 0;
  for (const char* name :
       {"model.layers.0.mlp.down_proj", "lm_head", "model.embed_tokens", "a", ""}) {
    accepted([&] { config.layer(name); });
  }
  const auto json = config_to_json(config);
  require(hqq::config_from_json(json) == config, "to_json_text() reads back equal");
  require(HqqConfig::from_json_text(json.dump()) == config, "its text reads back equal");
  return 0;
}
