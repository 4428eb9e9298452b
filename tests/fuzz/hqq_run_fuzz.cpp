// The loader of examples/hqq-run: config.json, tokenizer.json and a text, in this order. Tokens are
// those of the vocabulary, and the text comes back in pieces.
#include "examples/hqq-run/config.hpp"
#include "examples/hqq-run/tokenizer.hpp"
#include "tests/fuzz/fuzz_util.hpp"

using hqq::fuzzing::accepted;
using hqq::fuzzing::scratch;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr std::string_view kBetween = "\n====\n";
  std::string_view input = hqq::fuzzing::text_of(data, size);
  const auto next_part = [&] {
    const std::size_t end = std::min(input.find(kBetween), input.size());
    const std::string_view part = input.substr(0, end);
    input.remove_prefix(std::min(end + kBetween.size(), input.size()));
    return part;
  };
  scratch().write("config.json", next_part());
  scratch().write("tokenizer.json", next_part());
  accepted([] { Config::load(scratch() / "."); });
  accepted([&] {
    const Tokenizer tokenizer(scratch() / "tokenizer.json");
    // Short: an expression that backtracks would cost its whole limit, which has a test of its own.
    const std::string text(input.substr(0, 16));
    for (const std::int64_t token : tokenizer.encode(text)) tokenizer.decode(token);
    for (const std::int64_t token : {-1, 0, 1, 300}) tokenizer.decode(token);
  });
  return 0;
}
