#include "hqq/config.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "hqq/error.hpp"
#include "src/config/config_json.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

using ::testing::HasSubstr;
using testing::message_of;

std::string parse_error(const std::string& text) {
  return message_of([&] { HqqConfig::from_json_text(text); });
}

// ---- our own JSON form
// -----------------------------------------------------------------------------

TEST(ConfigJsonTest, EmptyObjectGivesDefaults) {
  EXPECT_EQ(HqqConfig::from_json_text("{}"), HqqConfig());
}

TEST(ConfigJsonTest, ReadsEveryKey) {
  const HqqConfig config = HqqConfig::from_json_text(R"({
    "nbits": 1.58, "group_size": null, "axis": 0, "solver": "hqq", "balance": "sinkhorn",
    "lp_norm": 0.5, "iterations": 7, "beta": 2, "kappa": 1.5, "grow_beta": true, "round_zero": false,
    "quant_zero": true, "quant_scale": true, "meta_dtype": "bfloat16",
    "dynamic_config": {"mlp.*": {"nbits": 3}, "lm_head": null},
    "skip_modules": ["a", "b"], "dynamic_only": true, "quant_method": "hqq_cpp",
    "quantizer": "hqq_cpp", "format_version": 1, "not_quantized": ["c"]})");
  EXPECT_EQ(config.defaults.nbits, BitWidth::kTernary);
  EXPECT_EQ(config.defaults.group_size, std::nullopt);
  EXPECT_EQ(config.defaults.axis, 0);
  EXPECT_EQ(config.defaults.solver, Solver::kHqq);
  EXPECT_EQ(config.defaults.balance, Balance::kSinkhorn);
  EXPECT_EQ(config.defaults.lp_norm, 0.5);
  EXPECT_EQ(config.defaults.iterations, 7);
  EXPECT_EQ(config.defaults.beta, 2.0);
  EXPECT_EQ(config.defaults.kappa, 1.5);
  EXPECT_TRUE(config.defaults.grow_beta);
  EXPECT_EQ(config.defaults.round_zero, false);
  EXPECT_TRUE(config.defaults.quant_zero);
  EXPECT_TRUE(config.defaults.quant_scale);
  EXPECT_EQ(config.defaults.meta_dtype, DType::kBF16);
  EXPECT_EQ(config.skip_modules, (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(config.dynamic_only);
  ASSERT_EQ(config.dynamic_config.size(), 2u);
  EXPECT_EQ(config.dynamic_config[0].first, "mlp.*");
  LayerConfig expected = config.defaults;
  expected.nbits = BitWidth::k3;
  EXPECT_EQ(config.dynamic_config[0].second, expected);
  EXPECT_EQ(config.dynamic_config[1].second, std::nullopt);
}

TEST(ConfigJsonTest, RulesStartFromDefaultsThatComeLaterInTheText) {
  const HqqConfig config =
      HqqConfig::from_json_text(R"({"dynamic_config": {"a": {"nbits": 2}}, "group_size": 32})");
  EXPECT_EQ(config.dynamic_config[0].second->group_size, 32);
}

TEST(ConfigJsonTest, KeepsTheOrderOfRules) {
  const std::string text = R"({"dynamic_config": {"z*": {}, "m*": {}, "a*": {}}})";
  const HqqConfig config = HqqConfig::from_json_text(text);
  EXPECT_EQ(config.dynamic_config[0].first, "z*");
  EXPECT_EQ(config.dynamic_config[2].first, "a*");
  EXPECT_EQ(config_from_json(config_to_json(config)), config);
  // The sorted kind of JSON object converts, in its own order.
  EXPECT_EQ(config_from_json(nlohmann::json::parse(text)).dynamic_config[0].first, "a*");
}

TEST(ConfigJsonTest, AcceptsEverySpellingOfTernary) {
  for (const char* nbits : {"1.58", "1.585", "1.584962500721156"}) {
    EXPECT_EQ(HqqConfig::from_json_text(std::string("{\"nbits\": ") + nbits + "}").defaults.nbits,
              BitWidth::kTernary);
  }
  EXPECT_EQ(HqqConfig::from_json_text("{\"nbits\": 4.0}").defaults.nbits, BitWidth::k4);
}

TEST(ConfigJsonTest, WritesEveryKeyOfTheDefaults) {
  EXPECT_EQ(config_to_json(HqqConfig()).dump(),
            R"({"nbits":4,"group_size":64,"axis":1,"solver":"joint","balance":"auto",)"
            R"("lp_norm":null,"iterations":null,"beta":10.0,"kappa":1.01,"round_zero":null,)"
            R"("quant_zero":false,"quant_scale":false,"meta_dtype":"float16",)"
            R"("dynamic_config":{},"skip_modules":["lm_head"],"dynamic_only":false})");
}

struct BadText {
  std::string json;
  std::string message;
};

class BadTextTest : public ::testing::TestWithParam<BadText> {};

TEST_P(BadTextTest, IsRefused) {
  EXPECT_THAT(parse_error(GetParam().json), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadTextTest,
    ::testing::Values(
        BadText{R"({"nbit": 4})", "[config] unknown key 'nbit'; did you mean 'nbits'?"},
        BadText{R"({"groupsize": 64})", "unknown key 'groupsize'; did you mean 'group_size'?"},
        BadText{R"({"skip_module": []})", "unknown key 'skip_module'; did you mean 'skip_modules'"},
        BadText{R"({"calibration_data_set": 1})", "Known are: nbits, group_size, axis"},
        BadText{
            R"({"nbits": "four"})",
            "[config] nbits is \"four\" (a string); it must be one of 8, 6, 5, 4, 3, 2, 1.58, 1"},
        BadText{R"({"nbits": 7})", "[config] nbits is 7 (a number); it must be one of 8, 6"},
        BadText{R"({"nbits": 4.005})", "nbits is 4.005 (a number); it must be one of"},
        BadText{R"({"nbits": null})", "nbits is null; it must be one of"},
        BadText{R"({"group_size": 64.5})", "group_size is 64.5 (a number); it must be a multiple"},
        BadText{R"({"group_size": 18446744073709551615})", "group_size is 18446744073709551615"},
        BadText{R"({"group_size": "none"})", "group_size is \"none\" (a string)"},
        BadText{R"({"group_size": 12})", "[config] group_size is 12; it must be a multiple of 8"},
        BadText{R"({"axis": 3})", "axis is 3; it must be 0 or 1"},
        BadText{R"({"axis": 4294967297})", "axis is 4294967297 (a number); it must be 0 or 1"},
        BadText{R"({"axis": true})", "axis is true (a boolean); it must be 0 or 1"},
        BadText{R"({"solver": "magic"})",
                "solver is \"magic\" (a string); it must be one of minmax, hqq, joint"},
        BadText{R"({"solver": 1})", "solver is 1 (a number); it must be one of minmax, hqq, joint"},
        BadText{R"({"balance": "awq"})", "it must be one of auto, none, sinkhorn"},
        BadText{R"({"lp_norm": []})", "lp_norm is [] (an array); it must be a number above 0"},
        BadText{R"({"iterations": 1.5})", "iterations is 1.5 (a number); it must be an integer"},
        BadText{R"({"beta": null})", "beta is null; it must be a number above 0"},
        BadText{R"({"kappa": "x"})", "kappa is \"x\" (a string); it must be a number, 1 or more"},
        BadText{R"({"grow_beta": 1})", "grow_beta is 1 (a number); it must be true or false"},
        BadText{R"({"round_zero": 1})", "round_zero is 1 (a number); it must be true or false"},
        BadText{R"({"quant_zero": null})", "quant_zero is null; it must be true or false"},
        BadText{R"({"quant_scale": 0})", "quant_scale is 0 (a number); it must be true or false"},
        BadText{R"({"meta_dtype": "half"})",
                "meta_dtype is \"half\" (a string); it must be one of float16, bfloat16, float32"},
        BadText{R"({"meta_dtype": "int8"})",
                "meta_dtype is int8; it must be float16, bfloat16 or float32"},
        BadText{R"({"skip_modules": "lm_head"})",
                "skip_modules is \"lm_head\" (a string); it must be an array of layer names"},
        BadText{R"({"skip_modules": [3]})", "an entry of skip_modules is 3 (a number)"},
        BadText{R"({"skip_modules": [""]})", "a layer name or pattern must not be empty"},
        BadText{R"({"skip_modules": ["re:("]})", "'re:(' is not a valid regex"},
        BadText{R"({"dynamic_only": "yes"})", "dynamic_only is \"yes\" (a string)"},
        BadText{R"({"dynamic_config": []})",
                "dynamic_config is [] (an array); it must be an object {...}"},
        BadText{R"({"dynamic_config": {"a": 3}})",
                "[config, rule 'a'] it is 3 (a number); it must be an object {...}"},
        BadText{R"({"dynamic_config": {"a": {"nbitz": 3}}})",
                "[config, rule 'a'] unknown key 'nbitz'; did you mean 'nbits'?"},
        BadText{R"({"dynamic_config": {"a": {"axis": 3}}})",
                "[config, rule 'a'] axis is 3; it must be 0 or 1"},
        BadText{R"({"dynamic_config": {"": {}}})", "must not be empty"},
        BadText{R"({"dynamic_config": {"layers[0": {}}})",
                "glob 'layers[0' has a '[' without its ']'"},
        BadText{R"({"dynamic_config": {"re:a{": {}}})", "'re:a{' is not a valid regex"},
        BadText{R"({"dynamic_config": {"a": {}, "a": {}}})",
                "[config] JSON key \"a\" appears twice"},
        BadText{R"({"nbits": 4, "nbits": 3})", "[config] JSON key \"nbits\" appears twice"},
        BadText{R"({"quant_method": "gptq"})", "quant_method is \"gptq\" (a string)"},
        BadText{R"({"quantizer": "hqq"})",
                "quantizer is \"hqq\" (a string); it must be \"hqq_cpp\""},
        BadText{R"({"view_as_float": true})", "view_as_float true is not supported"},
        BadText{"[]", "[config] it is [] (an array); it must be an object {...}"},
        BadText{"", "[config] not JSON at byte 1"},
        BadText{R"({"nbits": 4)", "[config] not JSON at byte 12"},
        BadText{R"({"lp_norm": 1e999})", "[config] number overflow parsing '1e999'"},
        BadText{R"({"iterations": 99999999999999999999})", "iterations is 1e+20 (a number)"}));

TEST(ConfigJsonTest, TextsThatEndTooEarlyOrGoTooDeep) {
  EXPECT_THAT(parse_error(std::string("{\"nbits\": 3}\0{\"nbits\": 2}", 26)),
              HasSubstr("[config] not JSON: NUL byte at byte 12"));
  EXPECT_THAT(parse_error(std::string(200'000, '[')), HasSubstr("nested deeper than 64 levels"));
  EXPECT_THAT(parse_error("{\"dynamic_config\": {\"a\": " + std::string(200'000, '[')),
              HasSubstr("nested deeper than 64 levels"));
}

TEST(ConfigJsonTest, LongValuesAreCutInMessages) {
  const std::string message = parse_error("{\"solver\": \"" + std::string(100000, 'x') + "\"}");
  EXPECT_THAT(message, HasSubstr("solver is \"xxx"));
  EXPECT_LT(message.size(), 300u);
  EXPECT_LT(parse_error("{\"" + std::string(100000, 'x') + "\": 1}").size(), 600u);
  const std::string key = "\"" + std::string(100000, 'x') + "\": ";
  EXPECT_LT(parse_error("{" + key + "1, " + key + "1}").size(), 300u);
  EXPECT_LT(parse_error("{\"dynamic_config\": {" + key + "1}}").size(), 300u);
  const std::string glob = "\"[" + std::string(100000, 'x') + "\"";
  EXPECT_LT(parse_error("{\"skip_modules\": [" + glob + "]}").size(), 300u);
}

// from_json(to_json(c)) == c for random configs.
TEST(ConfigJsonTest, RandomConfigsSurviveTheRoundTrip) {
  std::mt19937 random(20240607);
  const auto below = [&](int count) {
    return std::uniform_int_distribution<>(0, count - 1)(random);
  };
  const auto layer = [&] {
    std::uniform_real_distribution<double> unit(0.0, 1.0);
    LayerConfig c;
    c.nbits = kAllBitWidths[below(8)];
    c.group_size =
        below(3) == 0 ? std::nullopt : std::optional<std::int64_t>(8 * (1 + below(5000)));
    c.axis = below(2);
    c.solver = static_cast<Solver>(below(3));
    c.balance = static_cast<Balance>(below(3));
    if (below(2)) c.lp_norm = 1.0 - unit(random);
    if (below(2)) c.iterations = 1 + below(1000);
    c.beta = 1e-3 + 100 * unit(random);
    c.kappa = 1 + unit(random);
    c.grow_beta = below(2) == 1;
    if (below(2)) c.round_zero = below(2) == 1;
    c.quant_zero = below(2) == 1;
    c.quant_scale = below(2) == 1;
    c.meta_dtype = std::array{DType::kF16, DType::kBF16, DType::kF32}[below(3)];
    return c;
  };
  const std::vector<std::string> names = {"mlp.down_proj", "*.experts.*",       "re:.*[0-9]$",
                                          "lm_head",       "a \"quoted\" name", "layers.[0-3].*"};
  for (int i = 0; i < 500; ++i) {
    HqqConfig config(layer());
    std::vector<std::string> keys = names;
    std::shuffle(keys.begin(), keys.end(), random);
    keys.resize(below(static_cast<int>(names.size()) + 1));
    for (const std::string& key : keys) {
      config.dynamic_config.emplace_back(
          key, below(4) == 0 ? std::nullopt : std::optional<LayerConfig>(layer()));
    }
    config.skip_modules.assign(below(3), "skipped");
    config.dynamic_only = below(2) == 1;
    ASSERT_EQ(config_from_json(config_to_json(config)), config) << config_to_json(config).dump(2);
    ASSERT_EQ(HqqConfig::from_json_text(config.to_json_text()), config);
  }
}

// ---- upstream's and Transformers' forms, as those packages wrote them
// ---------------------------------

TEST(ForeignConfigTest, BaseQuantizeConfig) {
  // hqq 0.2.8: BaseQuantizeConfig(nbits=4, group_size=64)
  const HqqConfig config = HqqConfig::from_json_text(
      R"({"weight_quant_params": {"nbits": 4, "channel_wise": true, "group_size": 64, "optimize": true, "round_zero": true, "axis": 1, "view_as_float": false}, "scale_quant_params": null, "zero_quant_params": null, "offload_meta": false})");
  LayerConfig expected;
  expected.balance = Balance::kNone;
  expected.round_zero = true;
  EXPECT_EQ(config.defaults, expected);
  EXPECT_FALSE(config.dynamic_only);
  EXPECT_EQ(config.skip_modules, std::vector<std::string>{"lm_head"});
}

TEST(ForeignConfigTest, BaseQuantizeConfigWithoutGroups) {
  // BaseQuantizeConfig(nbits=3, group_size=None, axis=0)
  const LayerConfig config =
      HqqConfig::from_json_text(
          R"({"weight_quant_params": {"nbits": 3, "channel_wise": true, "group_size": null, "optimize": true, "round_zero": false, "axis": 0, "view_as_float": false}, "scale_quant_params": null, "zero_quant_params": null, "offload_meta": false})")
          .defaults;
  EXPECT_EQ(config.nbits, BitWidth::k3);
  EXPECT_EQ(config.group_size, std::nullopt);
  EXPECT_EQ(config.axis, 0);
  EXPECT_EQ(config.round_zero, false);
}

TEST(ForeignConfigTest, BaseQuantizeConfigWithQuantizedMetadata) {
  // BaseQuantizeConfig(nbits=2, group_size=16, quant_zero=True, quant_scale=True, axis=0)
  const LayerConfig both =
      HqqConfig::from_json_text(
          R"({"weight_quant_params": {"nbits": 2, "channel_wise": true, "group_size": 16, "optimize": true, "round_zero": false, "axis": 0, "view_as_float": false}, "scale_quant_params": {"nbits": 8, "channel_wise": true, "group_size": 128, "optimize": false}, "zero_quant_params": {"nbits": 8, "channel_wise": false, "group_size": null, "optimize": false}, "offload_meta": false})")
          .defaults;
  EXPECT_TRUE(both.quant_scale);
  EXPECT_TRUE(both.quant_zero);
  // BaseQuantizeConfig(nbits=8, group_size=128, quant_zero=True)
  const LayerConfig zero =
      HqqConfig::from_json_text(
          R"({"weight_quant_params": {"nbits": 8, "channel_wise": true, "group_size": 128, "optimize": true, "round_zero": false, "axis": 1, "view_as_float": false}, "scale_quant_params": null, "zero_quant_params": {"nbits": 8, "channel_wise": false, "group_size": null, "optimize": false}, "offload_meta": false})")
          .defaults;
  EXPECT_FALSE(zero.quant_scale);
  EXPECT_TRUE(zero.quant_zero);
  // BaseQuantizeConfig(nbits=4, quant_zero=True, quant_scale=True, offload_meta=True)
  const LayerConfig offloaded =
      HqqConfig::from_json_text(
          R"({"weight_quant_params": {"nbits": 4, "channel_wise": true, "group_size": 64, "optimize": true, "round_zero": true, "axis": 1, "view_as_float": false}, "scale_quant_params": {"nbits": 8, "channel_wise": true, "group_size": 128, "optimize": false}, "zero_quant_params": {"nbits": 8, "channel_wise": true, "group_size": 128, "optimize": false}, "offload_meta": true})")
          .defaults;
  EXPECT_TRUE(offloaded.quant_scale);
  EXPECT_TRUE(offloaded.quant_zero);
}

TEST(ForeignConfigTest, MissingKeysMeanWhatUpstreamAssumes) {
  const LayerConfig config = HqqConfig::from_json_text(R"({"weight_quant_params": {}})").defaults;
  EXPECT_EQ(config.nbits, BitWidth::k4);
  EXPECT_EQ(config.group_size, 64);
  EXPECT_EQ(config.axis, 0);
  EXPECT_EQ(config.round_zero, false);
}

TEST(ForeignConfigTest, OptimizeFalseIsMinMax) {
  const HqqConfig config =
      HqqConfig::from_json_text(R"({"weight_quant_params": {"optimize": false}})");
  EXPECT_EQ(config.defaults.solver, Solver::kMinMax);
}

TEST(ForeignConfigTest, TransformersHqqConfig) {
  // transformers.HqqConfig(nbits=3, group_size=32, axis=0, skip_modules=["lm_head",
  // "embed"]).to_dict()
  const HqqConfig config = HqqConfig::from_json_text(
      R"({"quant_config": {"weight_quant_params": {"nbits": 3, "channel_wise": true, "group_size": 32, "optimize": true, "round_zero": false, "axis": 0, "view_as_float": false}, "scale_quant_params": null, "zero_quant_params": null, "offload_meta": false}, "quant_method": "hqq", "skip_modules": ["lm_head", "embed"]})");
  EXPECT_EQ(config.defaults.nbits, BitWidth::k3);
  EXPECT_EQ(config.defaults.group_size, 32);
  EXPECT_EQ(config.defaults.axis, 0);
  EXPECT_EQ(config.defaults.balance, Balance::kNone);
  EXPECT_EQ(config.skip_modules, (std::vector<std::string>{"lm_head", "embed"}));
  EXPECT_FALSE(config.dynamic_only);
}

// HqqConfig(dynamic_config={"self_attn.q_proj": q4, "self_attn.k_proj": q4, "mlp.gate_proj": q3})
const std::string kPerTag =
    R"({"self_attn.q_proj": {"weight_quant_params": {"nbits": 4, "channel_wise": true, "group_size": 64, "optimize": true, "round_zero": true, "axis": 1, "view_as_float": false}, "scale_quant_params": null, "zero_quant_params": null, "offload_meta": false}, "self_attn.k_proj": {"weight_quant_params": {"nbits": 4, "channel_wise": true, "group_size": 64, "optimize": true, "round_zero": true, "axis": 1, "view_as_float": false}, "scale_quant_params": null, "zero_quant_params": null, "offload_meta": false}, "mlp.gate_proj": {"weight_quant_params": {"nbits": 3, "channel_wise": true, "group_size": 32, "optimize": true, "round_zero": false, "axis": 1, "view_as_float": false}, "scale_quant_params": null, "zero_quant_params": null, "offload_meta": false}})";

TEST(ForeignConfigTest, TransformersPerTagLeavesOtherLayersAlone) {
  for (const std::string& text : {"{\"quant_config\": " + kPerTag +
                                      R"(, "quant_method": "hqq", "skip_modules": ["lm_head"]})",
                                  kPerTag}) {
    const HqqConfig config = HqqConfig::from_json_text(text);
    EXPECT_TRUE(config.dynamic_only);
    ASSERT_EQ(config.dynamic_config.size(), 3u);
    const auto gate = config.layer("model.layers.0.mlp.gate_proj");
    ASSERT_TRUE(gate);
    EXPECT_EQ(gate->nbits, BitWidth::k3);
    EXPECT_EQ(gate->group_size, 32);
    EXPECT_EQ(gate->balance, Balance::kNone);
    EXPECT_TRUE(config.layer("model.layers.11.self_attn.q_proj"));
    EXPECT_EQ(config.layer("model.layers.0.mlp.up_proj"), std::nullopt);
    EXPECT_EQ(config_from_json(config_to_json(config)), config);
  }
}

TEST(ForeignConfigTest, TransformersKeywords) {
  const HqqConfig config = HqqConfig::from_json_text(
      R"({"nbits": 8, "group_size": 128, "view_as_float": false, "axis": null,
          "dynamic_config": {"mlp.up_proj": {"nbits": 2, "group_size": 16, "offload_meta": false,
                                             "view_as_float": false}},
          "skip_modules": null, "quant_method": "hqq"})");
  EXPECT_EQ(config.defaults.nbits, BitWidth::k8);
  EXPECT_EQ(config.defaults.axis, 1);
  EXPECT_EQ(config.layer("model.layers.4.mlp.up_proj")->group_size, 16);
  EXPECT_TRUE(config.skip_modules.empty());
}

INSTANTIATE_TEST_SUITE_P(
    Foreign, BadTextTest,
    ::testing::Values(
        // BaseQuantizeConfig(nbits=1.58, group_size=64, view_as_float=True)
        BadText{
            R"({"weight_quant_params": {"nbits": 1.58, "channel_wise": true, "group_size": 64, "optimize": true, "round_zero": false, "axis": 1, "view_as_float": true}, "scale_quant_params": null, "zero_quant_params": null, "offload_meta": false})",
            "[config] view_as_float true is not supported: codes are always stored as uint8"},
        BadText{R"({"weight_quant_params": {"channel_wise": false}})",
                "channel_wise false (one scale for the whole matrix) is not supported; use true"},
        BadText{R"({"weight_quant_params": {"nbitz": 4}})",
                "[config, weight_quant_params] unknown key 'nbitz'; did you mean 'nbits'?"},
        BadText{R"({"weight_quant_params": {"solver": "hqq"}})", "unknown key 'solver'"},
        BadText{R"({"weight_quant_params": null})",
                "weight_quant_params is null; it must be an object {...}"},
        BadText{R"({"weight_quant_params": {}, "scale_quant_param": null})",
                "unknown key 'scale_quant_param'; did you mean 'scale_quant_params'?"},
        BadText{R"({"weight_quant_params": {}, "scale_quant_params": {"nbits": 4}})",
                "scale_quant_params.nbits is 4 (a number); it must be 8"},
        BadText{R"({"weight_quant_params": {}, "zero_quant_params": {"group_size": 64}})",
                "zero_quant_params.group_size is 64 (a number); it must be 128 or null"},
        BadText{R"({"weight_quant_params": {}, "zero_quant_params": {"bits": 8}})",
                "[config, zero_quant_params] unknown key 'bits'; did you mean 'nbits'?"},
        BadText{R"({"weight_quant_params": {}, "zero_quant_params": true})",
                "zero_quant_params is true (a boolean); it must be an object {...}"},
        BadText{R"({"weight_quant_params": {"group_size": 20}})", "group_size is 20"},
        BadText{R"({"quant_config": {}})", "quant_config is empty"},
        BadText{R"({"quant_config": 4})", "quant_config is 4 (a number); it must be an object"},
        BadText{R"({"quant_config": {"weight_quant_params": {}}, "skip": []})",
                "unknown key 'skip'; did you mean 'skip_modules'?"},
        BadText{R"({"quant_config": {"mlp.up_proj": {"weight_quant_params": {"nbits": 9}}}})",
                "[config, rule 'mlp.up_proj'] nbits is 9 (a number)"}));

}  // namespace
}  // namespace hqq
