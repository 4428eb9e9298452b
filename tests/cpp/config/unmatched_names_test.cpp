// Names in a config that fit nothing, and what is nearest to them.
#include "src/config/unmatched_names.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>

#include "hqq/config.hpp"

namespace hqq {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

const ModelNames kModel = {
    {"model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj",
     "model.layers.10.self_attn.q_proj", "model.layers.10.mlp.experts.down_proj",
     "model.layers.10.mlp.gate", "model.vision_tower.layers.0.fc1"},
    {"model.norm", "model.layers.0.self_attn.q_proj.bias"}};

std::vector<std::string> sentences(const std::string& config,
                                   const std::vector<std::string>& importance = {}) {
  return describe(unmatched_names(HqqConfig::from_json_text(config), kModel, importance));
}

TEST(UnmatchedNamesTest, NamesThatFitAreNotMentioned) {
  EXPECT_THAT(sentences(R"({
    "skip_modules": ["lm_head", "norm", "mlp", "model.layers.0", "*.fc1", "q_proj.bias"],
    "dynamic_config": {"embed_tokens": {"nbits": 8}, "mlp.gate": {"nbits": 8}, "re:.*q_proj": null,
      "experts": {"nbits": 3}, "model.layers.10.mlp.experts.down_proj": {"nbits": 3}}})",
                        {"model.layers.0.mlp.up_proj", "model.layers.10.mlp.gate"}),
              IsEmpty());
}

TEST(UnmatchedNamesTest, TheNearestIsNamed) {
  EXPECT_THAT(
      sentences(R"({"skip_modules": ["self_attn.q_prj", "vision", "model.layers.1"],
    "dynamic_config": {"mlp.norm": {"nbits": 8}, "mlp.*": {"nbits": 3},
      "re:.*\\.experts\\.dwn_proj": null,
      "model.layers.0.mlp.upproj": {"nbits": 2}}})",
                {"mlp.up_proj"}),
      ElementsAre("dynamic_config names no layer: 'mlp.norm'; nearest is 'mlp.gate'",
                  "dynamic_config names no layer: 'mlp.*'; nearest is 'mlp'",
                  "dynamic_config names no layer: 're:.*\\.experts\\.dwn_proj'; nearest is "
                  "'experts.down_proj'",
                  "dynamic_config names no layer: 'model.layers.0.mlp.upproj'; nearest is "
                  "'model.layers.0.mlp.up_proj'",
                  "skip_modules names no layer: 'self_attn.q_prj'; nearest is 'self_attn.q_proj'",
                  "skip_modules names no layer: 'vision'; nearest is 'vision_tower'",
                  "skip_modules names no layer: 'model.layers.1'; nearest is 'model.layers.10'",
                  "importance names no layer: 'mlp.up_proj'; nearest is "
                  "'model.layers.0.mlp.up_proj'"));
}

TEST(UnmatchedNamesTest, ManyAreCounted) {
  HqqConfig config;
  for (int i = 0; i < 20; ++i) config.skip_modules.push_back("nothing." + std::to_string(i));
  const std::vector<UnmatchedName> names = unmatched_names(config, kModel);
  EXPECT_EQ(names.size(), 20u);
  const std::vector<std::string> said = describe(names);
  ASSERT_EQ(said.size(), 9u);
  EXPECT_EQ(said.back(), "12 more names fit no layer either");
}

TEST(UnmatchedNamesTest, NothingIsNearToNothing) {
  HqqConfig config;
  config.skip_modules = {"a", "re:[0-9]*?"};
  EXPECT_THAT(
      describe(unmatched_names(config, {})),
      ElementsAre("skip_modules names no layer: 'a'", "skip_modules names no layer: 're:[0-9]*?'"));
}

TEST(UnmatchedNamesTest, AHundredThousandLayersTakeAMoment) {
  ModelNames model;
  for (int i = 0; i < 100'000; ++i) {
    model.layers.push_back("model.layers." + std::to_string(i / 1000) + ".mlp.experts." +
                           std::to_string(i % 1000) + ".down_proj");
  }
  HqqConfig config;
  for (int i = 0; i < 20; ++i) {
    config.skip_modules.push_back("model.layers." + std::to_string(i) + ".mlp.experts.5.dwn_proj");
  }
  const auto start = std::chrono::steady_clock::now();
  const std::vector<UnmatchedName> names = unmatched_names(config, model, model.layers);
  EXPECT_EQ(names[3].nearest, "model.layers.3.mlp.experts.5.down_proj");
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

}  // namespace
}  // namespace hqq
