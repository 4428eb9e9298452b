#include "src/config/layer_match.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>

#include "hqq/config.hpp"
#include "hqq/error.hpp"

namespace hqq {
namespace {

using ::testing::HasSubstr;

template <class Function>
std::string message_of(Function&& function) {
  try {
    function();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(LayerTagTest, DropsModelLayersAndNumbers) {
  EXPECT_EQ(layer_tag("model.layers.3.self_attn.q_proj"), "self_attn.q_proj");
  EXPECT_EQ(layer_tag("model.layers.3.mlp.experts.17.down_proj"), "mlp.experts.down_proj");
  EXPECT_EQ(layer_tag("lm_head"), "lm_head");
  EXPECT_EQ(layer_tag("encoder.layer.0.attention.self.query"),
            "encoder.layer.attention.self.query");
  EXPECT_EQ(layer_tag("blocks.0.fc1"), "blocks.fc1");
  EXPECT_EQ(layer_tag("model.layers.3"), "");
  EXPECT_EQ(layer_tag(""), "");
}

HqqConfig config_of(const std::string& text) { return HqqConfig::from_json_text(text); }

double nbits_at(const HqqConfig& config, const std::string& name) {
  const auto layer = config.layer(name);
  return layer ? nbits_of(layer->nbits) : 0;
}

TEST(LayerRuleTest, NameBeatsSkipBeatsTagBeatsPatternBeatsDefaults) {
  const HqqConfig config =
      config_of(R"({"nbits": 8, "skip_modules": ["lm_head", "*.1.mlp.down_proj"],
    "dynamic_config": {"*down_proj": {"nbits": 2}, "re:.*proj": {"nbits": 1},
      "mlp.down_proj": {"nbits": 3}, "model.layers.0.mlp.down_proj": {"nbits": 6},
      "mlp.up_proj": null, "lm_head": {"nbits": 5}}})");
  EXPECT_EQ(nbits_at(config, "model.layers.0.mlp.down_proj"), 6);
  EXPECT_EQ(nbits_at(config, "model.layers.1.mlp.down_proj"), 0);
  EXPECT_EQ(nbits_at(config, "model.layers.2.mlp.down_proj"), 3);
  EXPECT_EQ(nbits_at(config, "model.layers.2.other.down_proj"), 2);
  EXPECT_EQ(nbits_at(config, "model.layers.2.self_attn.q_proj"), 1);
  EXPECT_EQ(nbits_at(config, "model.layers.2.mlp.up_proj"), 0);
  EXPECT_EQ(nbits_at(config, "model.embed_tokens"), 8);
  EXPECT_EQ(nbits_at(config, "lm_head"), 5);
  EXPECT_EQ(nbits_at(config, "language_model.lm_head"), 0);
}

TEST(LayerRuleTest, NamesOfParentsCoverWhatIsBelow) {
  const HqqConfig config = config_of(R"({"nbits": 8,
    "skip_modules": ["model.layers.3", "vision_tower"],
    "dynamic_config": {"*.k_proj": {"nbits": 1}, "self_attn": {"nbits": 2}, "mlp": {"nbits": 3},
      "model.layers.1": {"nbits": 4}, "mlp.down_proj": {"nbits": 6}, "up_proj": {"nbits": 5},
      "layers.2.mlp.up_proj": null}})");
  EXPECT_EQ(nbits_at(config, "model.layers.0.self_attn.k_proj"), 2);  // a name before a pattern
  EXPECT_EQ(nbits_at(config, "model.layers.10.self_attn.q_proj"), 2);
  EXPECT_EQ(nbits_at(config, "model.layers.1.self_attn.q_proj"), 4);  // more components
  EXPECT_EQ(nbits_at(config, "model.layers.1.mlp.down_proj"), 6);     // its own before a parent's
  EXPECT_EQ(nbits_at(config, "model.layers.1.mlp.up_proj"), 5);
  EXPECT_EQ(nbits_at(config, "model.layers.2.mlp.up_proj"), 0);
  EXPECT_EQ(nbits_at(config, "model.layers.0.mlp.gate_proj"), 3);
  EXPECT_EQ(nbits_at(config, "model.layers.3.mlp.down_proj"), 0);  // skipped, but for a full name
  EXPECT_EQ(nbits_at(config, "model.layers.30.mlp.down_proj"), 6);
  EXPECT_EQ(nbits_at(config, "model.vision_tower.encoder.layers.0.mlp.fc1"), 0);
  EXPECT_EQ(nbits_at(config, "model.layers.0.cross.k_proj"), 1);
  EXPECT_EQ(nbits_at(config, "model.layers.0.cross.v_proj"), 8);
}

TEST(LayerRuleTest, OfEquallyLongNamesTheFirstWins) {
  for (const auto& [rules, nbits] :
       {std::pair(R"({"vision": {"nbits": 2}, "mlp": {"nbits": 3}})", 2),
        std::pair(R"({"mlp": {"nbits": 3}, "vision": {"nbits": 2}})", 3)}) {
    const HqqConfig config = config_of(std::string(R"({"dynamic_config": )") + rules + "}");
    EXPECT_EQ(nbits_at(config, "vision.layers.0.mlp.fc1"), nbits);
  }
}

TEST(LayerRuleTest, SomeLayersMustBeNamedThemselves) {
  const HqqConfig config = config_of(R"({"nbits": 8, "dynamic_config":
    {"model": {"nbits": 3}, "embed_tokens": {"nbits": 4}, "*.wpe": {"nbits": 6}}})");
  const auto named = [&](const std::string& name) {
    const auto layer = config.layer(name, /*must_be_named=*/true);
    return layer ? nbits_of(layer->nbits) : 0;
  };
  EXPECT_EQ(named("model.embed_tokens"), 4);
  EXPECT_EQ(named("model.decoder.embed_tokens"), 4);
  EXPECT_EQ(named("transformer.wpe"), 6);
  EXPECT_EQ(named("model.wte"), 0);
  EXPECT_EQ(named("other"), 0);
  EXPECT_EQ(nbits_at(config, "model.wte"), 3);
}

TEST(LayerRuleTest, NumbersBeginPathsOnly) {
  const HqqConfig config = config_of(R"({"nbits": 8, "dynamic_config": {"1": {"nbits": 3}}})");
  EXPECT_EQ(nbits_at(config, "1"), 3);
  EXPECT_EQ(nbits_at(config, "1.0"), 3);
  EXPECT_EQ(nbits_at(config, "0.1"), 8);
  EXPECT_EQ(nbits_at(config, "model.layers.1.up_proj"), 8);
  EXPECT_EQ(nbits_at(config, "11"), 8);
}

TEST(LayerRuleTest, FirstPatternWins) {
  EXPECT_EQ(
      nbits_at(config_of(R"({"dynamic_config": {"z*": {"nbits": 2}, "*a": {"nbits": 3}}})"), "za"),
      2);
  EXPECT_EQ(
      nbits_at(config_of(R"({"dynamic_config": {"*a": {"nbits": 3}, "z*": {"nbits": 2}}})"), "za"),
      3);
}

TEST(LayerRuleTest, DynamicOnlyLeavesTheRest) {
  const HqqConfig config =
      config_of(R"({"dynamic_only": true, "dynamic_config": {"mlp.*": {"nbits": 2}}})");
  EXPECT_EQ(nbits_at(config, "mlp.up_proj"), 2);
  EXPECT_EQ(nbits_at(config, "self_attn.q_proj"), 0);
}

TEST(LayerRuleTest, SkipMatchesNamesOfLayersAndParentsGlobsAndRegexes) {
  const std::string name = "model.layers.12.mlp.down_proj";
  const std::string tag = layer_tag(name);
  for (const char* entry :
       {"model.layers.12.mlp.down_proj", "mlp.down_proj", "down_proj", "*.layers.1?.mlp.*",
        "re:.*\\.1[0-9]\\..*", "mlp", "model", "model.layers.12", "layers.12.mlp.down_proj"}) {
    EXPECT_TRUE(skip_matches(entry, name, tag)) << entry;
  }
  for (const char* entry :
       {"model.layers.1.mlp.down_proj", "model.layers.1", "proj", "ml", "mlp.", ".mlp",
        "layers.mlp", "12.mlp", "12", "*.layers.1?", "re:down_proj", "re:model"}) {
    EXPECT_FALSE(skip_matches(entry, name, tag)) << entry;
  }
  EXPECT_TRUE(skip_matches("1", "net.1", ""));
  EXPECT_FALSE(skip_matches("1", "net.1.0", ""));
  EXPECT_TRUE(
      skip_matches("experts.down_proj", "mlp.experts.3.down_proj", "mlp.experts.down_proj"));
}

TEST(GlobTest, Matches) {
  EXPECT_TRUE(glob_matches("*", ""));
  EXPECT_TRUE(glob_matches("a*b*c", "aXbbYc"));
  EXPECT_TRUE(glob_matches("**a", "bba"));
  EXPECT_TRUE(glob_matches("a?c", "abc"));
  EXPECT_TRUE(glob_matches("layers.[0-3].q", "layers.2.q"));
  EXPECT_TRUE(glob_matches("layers.[!0-3].q", "layers.7.q"));
  EXPECT_TRUE(glob_matches("[]]", "]"));
  EXPECT_TRUE(glob_matches("[!]]", "a"));
  EXPECT_TRUE(glob_matches("[a-]", "-"));
}

TEST(GlobTest, DoesNotMatch) {
  EXPECT_FALSE(glob_matches("", "a"));
  EXPECT_FALSE(glob_matches("a?c", "ac"));
  EXPECT_FALSE(glob_matches("a*b", "abc"));
  EXPECT_FALSE(glob_matches("layers.[0-3].q", "layers.7.q"));
  EXPECT_FALSE(glob_matches("layers.[!0-3].q", "layers.2.q"));
  EXPECT_FALSE(glob_matches("a.c", "abc"));
  EXPECT_FALSE(glob_matches("[ab", "a"));
}

TEST(GlobTest, ManyStarsStayFast) {
  std::string glob;
  for (int i = 0; i < 100; ++i) glob += "*a";
  const auto start = std::chrono::steady_clock::now();
  EXPECT_FALSE(glob_matches(glob + "b", std::string(5000, 'a')));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(2));
}

TEST(RegexTest, BadOnesAreRefused) {
  const auto refused = [](const std::string& pattern) {
    return message_of([&] { validate_pattern(pattern, "config"); });
  };
  EXPECT_THAT(refused("re:[a"), HasSubstr("[config] 're:[a' is not a valid regex"));
  EXPECT_THAT(refused("re:*"), HasSubstr("not a valid regex"));
  EXPECT_THAT(refused("re:\xFF"), HasSubstr("is not UTF-8"));
  EXPECT_THAT(refused("re:a{70000}"), HasSubstr("not a valid regex"));
  EXPECT_THAT(refused("re:" + std::string(600, 'a')),
              HasSubstr("may have 500 characters, this one"));
  EXPECT_THAT(refused("re:(((a{0,99}){0,99}){0,99})*"), HasSubstr("too large"));
  EXPECT_EQ(refused("re:(a|b)+[0-9]*"), "nothing was thrown");
  EXPECT_EQ(refused("re:" + std::string(200, '(') + "a" + std::string(200, ')')),
            "nothing was thrown");
}

TEST(RegexTest, LongNamesAreRefused) {
  EXPECT_THAT(message_of([] { pattern_matches("re:a*", std::string(5000, 'a')); }),
              HasSubstr("has 5000 characters, the limit is 1000"));
  EXPECT_TRUE(pattern_matches("re:a*", std::string(1000, 'a')));
}

// What ECMAScript lacks, or gives another meaning.
TEST(RegexTest, OtherSyntaxIsRefused) {
  const auto refused = [](const std::string& pattern) {
    return message_of([&] { validate_pattern("re:" + pattern, "config"); });
  };
  EXPECT_THAT(refused("(a)\\1"), HasSubstr("back-references such as \\1 are not supported"));
  for (const char* pattern : {"(?i)a", "(?<=a)b", "(?>a)", "(?<n>a)", "(?#a)", "(*UTF)a", "(?R)"}) {
    EXPECT_THAT(refused(pattern), HasSubstr("of groups only")) << pattern;
  }
  for (const char* pattern : {"\\Aa", "a\\z", "\\Qa\\E", "\\C", "\\K", "\\R", "[\\h]", "\\pL"}) {
    EXPECT_THAT(refused(pattern), HasSubstr("there is no escape")) << pattern;
  }
  for (const char* pattern : {"a++", "a*+", "a?+", "a{2}+"}) {
    EXPECT_THAT(refused(pattern), HasSubstr("cannot follow another quantifier")) << pattern;
  }
  for (const char* pattern : {"a{", "a{,3}", "a{x}", "a{1", "{"}) {
    EXPECT_THAT(refused(pattern), HasSubstr("must begin a number of repetitions")) << pattern;
  }
  EXPECT_THAT(refused("[]a]"), HasSubstr("the set [] is empty"));
  EXPECT_THAT(refused("\\x4"), HasSubstr("needs 2 hexadecimal digits"));
  EXPECT_THAT(refused("a\\"), HasSubstr("not a valid regex"));
}

TEST(RegexTest, MatchesAsEcmaScript) {
  const auto matches = [](const char* pattern, const std::string& name) {
    return pattern_matches(std::string("re:") + pattern, name);
  };
  EXPECT_TRUE(matches("^model\\.layers\\.\\d+\\.(?:mlp|attn)\\..*$", "model.layers.17.mlp.up"));
  EXPECT_FALSE(matches("layers", "model.layers"));
  EXPECT_FALSE(matches("a$", "a\n"));
  EXPECT_FALSE(matches(".", "\n"));
  EXPECT_FALSE(matches(".", "\r"));
  EXPECT_TRUE(matches("[^]", "\n"));
  EXPECT_TRUE(matches("[^x]*", "a\nb"));
  EXPECT_TRUE(matches("(?!.*mlp)(?=.*proj).*", "self_attn.q_proj"));
  EXPECT_FALSE(matches("(?!.*mlp).*", "mlp.up_proj"));
  EXPECT_TRUE(matches("\\w+[\\w.-]{2,}?[[:digit:]]\\x61\\u0062\\_\\-\\/", "layer.x-1ab_-/"));
  EXPECT_TRUE(matches("(a|ab)(c|bcd)(d*)", "abcd"));
  EXPECT_FALSE(matches("A", "a"));
}

TEST(RegexTest, WorkHasALimit) {
  const std::string deep = "re:" + std::string(120, '(') + ".";
  std::string nested = deep;
  for (int i = 0; i < 120; ++i) nested += ")*";
  const std::string name(1000, 'a');
  const auto start = std::chrono::steady_clock::now();
  for (const std::string& pattern :
       {nested, std::string("re:(a|a|aa)*[!#]{2}"), std::string("re:(a*)*(a*)*[!#]{2}"),
        std::string("re:(.*)*(.*)*(.*)*[=#]{2}"), std::string("re:(?:\\b|^){0,999}"),
        std::string("re:(?:.{0,500}){0,100}[!#]{2}"), std::string("re:((a?){0,99}){0,9}[!#]{2}")}) {
    const std::string message = message_of([&] { pattern_matches(pattern, name); });
    if (pattern == nested) continue;  // matches
    EXPECT_THAT(message, HasSubstr("steps, the limit")) << pattern;
    EXPECT_LT(message.size(), 450u);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1));
  // Far below it: every pair of places is tried.
  EXPECT_FALSE(pattern_matches("re:.*\\..*\\..*x", "model.layers.17.mlp.experts.211.down_proj"));
}

TEST(RegexTest, AConfigMayHaveAThousand) {
  HqqConfig config;
  for (int i = 0; i < 999; ++i) config.skip_modules.push_back("re:a" + std::to_string(i));
  config.dynamic_config.emplace_back("re:b", std::nullopt);
  EXPECT_EQ(message_of([&] { config.validate(); }), "nothing was thrown");
  config.dynamic_config.emplace_back("re:c", std::nullopt);
  EXPECT_THAT(message_of([&] { config.validate(); }),
              HasSubstr("it has 1001 regular expressions, more than the 1000 allowed"));
}

TEST(EditDistanceTest, CountsEdits) {
  EXPECT_EQ(edit_distance("", "abc"), 3u);
  EXPECT_EQ(edit_distance("abc", ""), 3u);
  EXPECT_EQ(edit_distance("nbit", "nbits"), 1u);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3u);
  EXPECT_EQ(edit_distance("same", "same"), 0u);
}

}  // namespace
}  // namespace hqq
