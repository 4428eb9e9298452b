// Members set and removed in JSON text, and what Python's json module writes.
#include "src/base/json_edit.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "tests/cpp/support/io_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::message_of;
using ::testing::StartsWith;

using Json = nlohmann::ordered_json;

std::string set(const std::string& text, const Json& value = {{"a", 1}}) {
  return set_json_member(text, {"q"}, value, "test");
}

std::string remove(const std::string& text, const std::string& key = "q") {
  return remove_json_member(text, key, "test");
}

// What no parser into 64-bit numbers and doubles keeps.
constexpr const char* kOdd =
    "{\"big\": 1000000000000000019884624838656, \"neg\": "
    "-170141183460469231731687303715884105728,\n"
    "\t\"f\": [1e-05, 1.0, 0.1000000000000000055, 1E+5, -0.0, 5e-324, 1e999],\r\n"
    " \"n\": [NaN, Infinity, -Infinity],\"s\": \"NaN, \\\"Infinity\\\" \\u00e9 \\\\\",\n"
    "\"o\" : {\"q\": {\"x\": [1, {}]}, \"}\": \"]\"}  }\n\n";

TEST(SetJsonMember, EveryOtherByteStays) {
  const std::string odd = kOdd;
  const std::string added = ",\n  \"q\": {\n    \"a\": 1\n  }";
  std::string expected = odd;
  expected.insert(odd.rfind("  }"), added);
  EXPECT_EQ(set(odd), expected);
  EXPECT_EQ(remove(set(odd)), odd);
  // Set once more, in place.
  EXPECT_EQ(set(set(odd, 5)), expected);
}

TEST(SetJsonMember, Places) {
  EXPECT_EQ(set("", 5), "{\n  \"q\": 5\n}\n");
  EXPECT_EQ(set("{}", 5), "{\n  \"q\": 5\n}");
  EXPECT_EQ(set(" { \n} \n", 5), " {\n  \"q\": 5\n} \n");
  EXPECT_EQ(set("{\"a\":1}", 5), "{\"a\":1,\n  \"q\": 5}");
  EXPECT_EQ(set("{\"q\":null,\"a\":1}", 5), "{\"q\":5,\"a\":1}");
  EXPECT_EQ(set("{\"a\":1, \"q\" : {\"q\": [\"}\"]} }", 5), "{\"a\":1, \"q\" : 5 }");
  // Escapes in a key, and the key as a value.
  EXPECT_EQ(set("{\"a\":\"q\",\"\\u0071\":1}", 5), "{\"a\":\"q\",\"\\u0071\":5}");
  EXPECT_EQ(set("{\"a\":{\"q\":1}}", "x\n"), "{\"a\":{\"q\":1},\n  \"q\": \"x\\n\"}");
}

TEST(SetJsonMember, InsideAnotherMember) {
  const auto total = [](const std::string& text) {
    return set_json_member(text, {"m", "t"}, 7, "test");
  };
  EXPECT_EQ(total("{\"m\": {\"x\": NaN, \"t\": 1e30}, \"w\": 1}"),
            "{\"m\": {\"x\": NaN, \"t\": 7}, \"w\": 1}");
  EXPECT_EQ(total("{\"m\": {}, \"w\": 1}"), "{\"m\": {\n    \"t\": 7\n  }, \"w\": 1}");
  EXPECT_EQ(total("{\"m\": [3]}"), "{\"m\": {\n    \"t\": 7\n  }}");
  EXPECT_EQ(total(""), "{\n  \"m\": {\n    \"t\": 7\n  }\n}\n");
}

TEST(RemoveJsonMember, WithItsComma) {
  EXPECT_EQ(remove("{\"q\": 1}"), "{}");
  EXPECT_EQ(remove("{\"q\": 1, \"a\": 2}"), "{\"a\": 2}");
  EXPECT_EQ(remove("{\"a\": 2 , \"q\": [1, 2]\n}"), "{\"a\": 2\n}");
  EXPECT_EQ(remove("{\"a\": 2, \"q\": \"\\\"},\", \"b\": 3}"), "{\"a\": 2, \"b\": 3}");
  EXPECT_EQ(remove("{\"a\": {\"q\": 1}}"), "{\"a\": {\"q\": 1}}");
}

TEST(SetJsonMember, Refusals) {
  for (const auto& action : {+[](const std::string& text) { return set(text); },
                             +[](const std::string& text) { return remove(text); }}) {
    const auto refusal = [&](const std::string& text) {
      return message_of<FormatError>([&] { action(text); });
    };
    EXPECT_THAT(refusal("[1]"), AllOf(StartsWith("[test]"), HasSubstr("object, but it is array")));
    EXPECT_THAT(refusal("{\"a\": 1"), HasSubstr("not JSON at byte 8"));
    EXPECT_THAT(refusal("{\"q\": 1, \"\\u0071\": 2}"), HasSubstr("\"q\" appears twice"));
    EXPECT_THAT(refusal("{\"a\": " + std::string(5'000'000, '[')), HasSubstr("deeper than 64"));
  }
}

TEST(ParsePythonJson, NumbersThatJsonLacks) {
  const Json json = parse_python_json(kOdd, "x");
  EXPECT_EQ(json["n"], (Json{nullptr, nullptr, nullptr}));
  EXPECT_EQ(json["f"][0], 1e-05);
  EXPECT_TRUE(json["f"][6].is_null());
  EXPECT_EQ(json["big"], 1e30);
  EXPECT_EQ(json["s"], "NaN, \"Infinity\" \xC3\xA9 \\");
  EXPECT_TRUE(parse_python_json("NaN", "x").is_null());
  EXPECT_TRUE(parse_python_json(std::string(400, '9'), "x").is_null());
  EXPECT_EQ(parse_python_json("[2, -Infinity, 0.0, 3]", "x"), (Json{2, nullptr, 0.0, 3}));
}

TEST(ParsePythonJson, NothingElseIsLetPass) {
  for (const char* text : {"[nan]", "[Inf]", "[+Infinity]", "[- Infinity]", "[-NaN]", "[NaN1]",
                           "[01e999]", "[1e99.]", "[.5]", "{NaN: 1}", "[Infinity", "[\"NaN]"}) {
    EXPECT_THAT(message_of<FormatError>([&] { parse_python_json(text, "test"); }),
                StartsWith("[test] not JSON at byte "))
        << text;
  }
  // At the byte of the fault, not at that of NaN.
  EXPECT_THAT(message_of<FormatError>([] { parse_python_json("[-Infinity, NaN, 1,]", "test"); }),
              StartsWith("[test] not JSON at byte 20: "));
  EXPECT_THAT(message_of<FormatError>([] { parse_python_json("{\"a\":1,\"a\":NaN}", "test"); }),
              HasSubstr("\"a\" appears twice"));
}

}  // namespace
}  // namespace hqq
