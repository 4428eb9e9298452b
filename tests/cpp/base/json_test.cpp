#include "src/base/json.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>

#include "hqq/error.hpp"
#include "tests/cpp/support/io_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::message_of;
using ::testing::SizeIs;
using ::testing::StartsWith;

std::string error_of(const std::string& text) {
  return message_of<FormatError>([&] { parse_json(text, "test"); });
}

std::string nested(int levels, const std::string& open, const std::string& close) {
  std::string text;
  for (int i = 0; i < levels; ++i) text += open;
  text += "0";
  for (int i = 0; i < levels; ++i) text += close;
  return text;
}

TEST(ParseJson, Values) {
  const auto json =
      parse_json(R"( {"a": [1, -2, 2.5, true, null, "\u00e9"], "b": {"a": 1}} )", "x");
  EXPECT_EQ(json["a"].size(), 6u);
  EXPECT_EQ(json["a"][1], -2);
  EXPECT_EQ(json["a"][5], "\xC3\xA9");
  EXPECT_EQ(json["b"]["a"], 1);
  EXPECT_EQ(parse_json("3", "x"), 3);
}

TEST(ParseJson, NamesTheByteOfASyntaxError) {
  EXPECT_THAT(error_of(R"({"a": 1,})"),
              AllOf(StartsWith("[test] not JSON at byte 9: "), HasSubstr("unexpected '}'")));
  EXPECT_THAT(error_of(""), HasSubstr("not JSON at byte 1: "));
  EXPECT_THAT(error_of("{} x"), HasSubstr("not JSON at byte 4: "));
  EXPECT_THAT(error_of("// c\n{}"), HasSubstr("not JSON at byte 1: "));
  EXPECT_THAT(error_of("[1e999]"), HasSubstr("number overflow"));
  EXPECT_THAT(error_of("\"\xFF\""), HasSubstr("ill-formed UTF-8"));
}

TEST(ParseJson, WhatTheParserAloneWouldLetPass) {
  EXPECT_THAT(error_of(std::string("{}\0{", 4)), HasSubstr("NUL byte at byte 2"));
  EXPECT_THAT(error_of("\xEF\xBB\xBF{}"), HasSubstr("byte order mark"));
  // Releases of the library say this in two ways.
  EXPECT_THAT(error_of(""), HasSubstr("not JSON at byte 1: the text is empty"));
  EXPECT_THAT(error_of(" \n\t\r"), HasSubstr("not JSON at byte 1: the text is empty"));
}

TEST(ParseJson, DuplicateKeysAtEveryLevel) {
  EXPECT_THAT(error_of(R"({"a":1,"a":1})"), HasSubstr("key \"a\" appears twice"));
  EXPECT_THAT(error_of(R"([{"x":{"b":1,"c":2,"b":3}}])"), HasSubstr("key \"b\" appears twice"));
  EXPECT_THAT(error_of(R"({"d":1,"\u0064":2})"), HasSubstr("key \"d\" appears twice"));
  // Equal keys of different objects are fine, whether beside or inside each other.
  EXPECT_NO_THROW(parse_json(R"([{"a":1},{"a":{"a":2}},{"b":{"a":1},"a":2}])", "x"));
}

TEST(ParseJson, DepthHasALimit) {
  EXPECT_NO_THROW(parse_json(nested(kMaxJsonDepth, "[", "]"), "x"));
  EXPECT_NO_THROW(parse_json(nested(kMaxJsonDepth, "{\"a\":", "}"), "x"));
  EXPECT_THAT(error_of(nested(kMaxJsonDepth + 1, "[", "]")), HasSubstr("deeper than 64 levels"));
  EXPECT_THAT(error_of(nested(kMaxJsonDepth + 1, "{\"a\":", "}")),
              HasSubstr("deeper than 64 levels"));
  // Far beyond what recursion would survive.
  EXPECT_THAT(error_of(std::string(20'000'000, '[')), HasSubstr("deeper than 64 levels"));
}

TEST(ParseJson, PythonsNumbersGetAHint) {
  EXPECT_THAT(error_of("[0.0, Infinity]"), HasSubstr("(Infinity is not a JSON number)"));
  EXPECT_THAT(error_of("[0.0, -Infinity]"), HasSubstr("(-Infinity is not a JSON number)"));
  EXPECT_THAT(error_of("{\"a\":NaN}"), HasSubstr("(NaN is not a JSON number)"));
  EXPECT_THAT(error_of("NaN"), HasSubstr("(NaN is not a JSON number)"));
  EXPECT_THAT(error_of("[None]"), ::testing::Not(HasSubstr("is not a JSON number")));
}

TEST(ParseJson, NumbersBeyondADoubleAreRefused) {
  EXPECT_EQ(error_of("[1, 1e999]"),
            "[test] number overflow parsing '1e999' at byte 9; a number may not be larger than a "
            "double, 1.8e308");
  EXPECT_THAT(error_of("[-" + std::string(100'000, '9') + "]"),
              AllOf(HasSubstr("number overflow"), SizeIs(::testing::Lt(400u))));
  EXPECT_EQ(parse_json("[1e308, 99999999999999999999]", "x").dump(), "[1e+308,1e+20]");
}

TEST(ParseJson, KeysStayInOrder) {
  const std::string text = R"({"b":1,"a":{"d":[{"z":1,"y":2}],"c":2}})";
  EXPECT_EQ(parse_json(text, "x").dump(), text);
  EXPECT_EQ(parse_python_json(text, "x").dump(), text);
  EXPECT_EQ(parse_config_json(text, "x").dump(), text);
}

TEST(ParseJson, WorkIsInProportionToTheText) {
  std::string text = "{";
  for (int i = 0; i < 300'000; ++i) text += "\"" + std::to_string(i) + "\":{},";
  text += "\"\":0}";
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(parse_json(text, "x").size(), 300'001u);
  // Seconds with a sanitizer; looking every key up among all before it would take minutes.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

TEST(ParseJson, SizeHasALimit) {
  EXPECT_NO_THROW(parse_json(std::string(1'000'000, ' ') + "1", "x"));
  EXPECT_THAT(error_of(std::string(kMaxJsonBytes, ' ') + "1"),
              HasSubstr("has 100000001 bytes, more than the 100000000 allowed"));
}

// What users write is a wrong value, what files hold a broken format.
TEST(ParseConfigJson, ErrorsAreNoFormatErrors) {
  for (const std::string& text :
       {std::string("{"), std::string("{\"a\":1e999}"), std::string("{\"a\":1,\"a\":2}"),
        nested(kMaxJsonDepth + 1, "[", "]"), std::string("{}\0{}", 5),
        std::string(kMaxConfigBytes, ' ') + "1"}) {
    try {
      parse_config_json(text, "config");
      ADD_FAILURE() << text.substr(0, 100);
    } catch (const FormatError& error) {
      ADD_FAILURE() << error.what();
    } catch (const std::invalid_argument& error) {
      EXPECT_THAT(error.what(), StartsWith("[config] "));
    }
  }
  EXPECT_EQ(parse_config_json("{\"nbits\": 4}", "config")["nbits"], 4);
}

TEST(ParseJson, MessagesDoNotRepeatTheInput) {
  EXPECT_THAT(error_of("{\"" + std::string(1'000'000, 'k')), SizeIs(::testing::Lt(300u)));
  const std::string key = "\"" + std::string(1'000'000, 'k') + "\":1";
  EXPECT_THAT(error_of("{" + key + "," + key + "}"), SizeIs(::testing::Lt(300u)));
}

TEST(QuoteText, EscapesAndCuts) {
  EXPECT_EQ(quote_text(""), "\"\"");
  EXPECT_EQ(quote_text("a.b-c \xC3\xA9"), "\"a.b-c \xC3\xA9\"");
  EXPECT_EQ(quote_text("a\"b\\c"), R"("a\"b\\c")");
  EXPECT_EQ(quote_text(std::string_view("\0\n\x1b\x7f", 4)), R"("\x00\x0a\x1b\x7f")");
  const std::string cut = quote_text(std::string(1'000, 'x'));
  EXPECT_LT(cut.size(), 150u);
  EXPECT_THAT(cut, ::testing::EndsWith("...\""));
}

TEST(QuoteText, NamesHaveSingleQuotes) {
  EXPECT_EQ(quote_name("re:a\\.\"b\""), "'re:a\\.\"b\"'");
  EXPECT_EQ(quote_name("\n\xFF"), R"('\x0a\xff')");
  EXPECT_LT(quote_name(std::string(1'000, 'x')).size(), 150u);
}

TEST(IsUtf8, KnowsWhatQuotesEscape) {
  for (const char* text : {"", "a", "\xC3\xA9", "\xF0\x9F\x98\x80", "\n"})
    EXPECT_TRUE(is_utf8(text));
  for (const char* text : {"\x80", "a\xC3", "\xC0\xAF", "\xED\xA0\x80", "\xFF"}) {
    EXPECT_FALSE(is_utf8(text)) << text;
  }
}

TEST(CutText, CharactersStayWhole) {
  EXPECT_EQ(cut_text("abc", 3), "abc");
  EXPECT_EQ(cut_text("abcd", 3), "abc...");
  EXPECT_EQ(cut_text("ab\xC3\xA9", 3), "ab...");
  EXPECT_EQ(cut_text("ab\xC3\xA9", 4), "ab\xC3\xA9");
}

TEST(ThrowInvalid, SentencesAreCut) {
  const std::string text(3'000'000, 'x');
  EXPECT_THAT(message_of<FormatError>([&] { throw_format(text, text); }),
              SizeIs(::testing::Lt(1300u)));
  EXPECT_THAT(message_of<std::invalid_argument>([&] { throw_invalid(text, text); }),
              SizeIs(::testing::Lt(1300u)));
}

TEST(QuoteText, BrokenUtf8IsEscapedByteByByte) {
  // Lone and missing continuation, overlong, surrogate, above U+10FFFF.
  EXPECT_EQ(quote_text("\x80"), R"("\x80")");
  EXPECT_EQ(quote_text("\xC3"), R"("\xc3")");
  EXPECT_EQ(quote_text("\xC3x"), R"("\xc3x")");
  EXPECT_EQ(quote_text("\xC0\xAF"), R"("\xc0\xaf")");
  EXPECT_EQ(quote_text("\xE0\x80\x80"), R"("\xe0\x80\x80")");
  EXPECT_EQ(quote_text("\xED\xA0\x80"), R"("\xed\xa0\x80")");
  EXPECT_EQ(quote_text("\xF4\x90\x80\x80"), R"("\xf4\x90\x80\x80")");
  EXPECT_EQ(quote_text("\xF0\x9F\x98\x80"), "\"\xF0\x9F\x98\x80\"");
}

}  // namespace
}  // namespace hqq
