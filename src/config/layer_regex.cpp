#include "src/config/layer_regex.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cctype>
#include <memory>
#include <string_view>
#include <unordered_map>

#include "hqq/error.hpp"
#include "src/base/quoted_text.hpp"

namespace hqq {
namespace {

constexpr std::string_view kPrefix = "re:";
// Characters of an expression, and bytes of what it is compiled to.
constexpr std::size_t kMaxLength = 500;
constexpr std::size_t kMaxCompiledBytes = 65'536;
constexpr std::size_t kMaxNameLength = 1000;
// Limits of one match; typical expressions need less than a hundred steps. A step may read the
// whole name or walk over the whole compiled expression (about 8 bytes an item).
constexpr std::size_t kMaxSteps = 100'000;
constexpr std::size_t kMaxWork = 4'000'000;
constexpr std::size_t kBytesOfItem = 8;
constexpr std::uint32_t kMaxHeapKilobytes = 16'384;

template <auto kFree>
struct FreeWith {
  template <class T>
  void operator()(T* object) const {
    kFree(object);
  }
};
using Code = std::unique_ptr<pcre2_code, FreeWith<&pcre2_code_free>>;
using CompileContext =
    std::unique_ptr<pcre2_compile_context, FreeWith<&pcre2_compile_context_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, FreeWith<&pcre2_match_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, FreeWith<&pcre2_match_data_free>>;

template <class T>
T allocated(T object) {
  if (!object) throw std::bad_alloc();
  return object;
}

bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }

std::size_t count_while(std::string_view text, int (*is_in)(int)) {
  std::size_t count = 0;
  while (count < text.size() && is_in(static_cast<unsigned char>(text[count])) != 0) ++count;
  return count;
}

// Finds what PCRE2 reads in another way than ECMAScript: Perl's extensions, most of all.
class SyntaxCheck {
 public:
  explicit SyntaxCheck(std::string_view expression) : text_(expression) {}

  // What is wrong, or nothing.
  std::string run() {
    while (problem_.empty() && at_ < text_.size()) step();
    return problem_;
  }

 private:
  std::string_view rest() const { return text_.substr(at_); }

  void step() {
    const char c = text_[at_];
    if (c == '\\') return escape();
    if (in_class_) return step_in_class(c);
    ++at_;
    if (c == '[') {
      in_class_ = true;
      if (rest().starts_with(']'))
        problem_ = "the set [] is empty; a ']' in a set is written '\\]'";
      if (rest().starts_with('^')) ++at_;
    } else if (c == '(') {
      group();
    } else if (c == '*' || c == '+' || c == '?') {
      end_quantifier();
    } else if (c == '{') {
      counted();
    }
  }

  void step_in_class(char c) {
    if (rest().starts_with("[:")) {
      // A ']' inside of "[:alpha:]" ends no class.
      const std::size_t end = text_.find(":]", at_ + 2);
      if (end != std::string_view::npos) at_ = end + 1;
    } else if (c == ']') {
      in_class_ = false;
    }
    ++at_;
  }

  void escape() {
    constexpr std::string_view kKnown = "bBdDsSwWcfnrtv0";
    const char c = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
    const std::string shown{'\\', c};
    at_ += 2;
    if (c == 'x' || c == 'u') {
      const std::size_t digits = c == 'x' ? 2 : 4;
      if (count_while(rest().substr(0, digits), &std::isxdigit) < digits) {
        problem_ = shown + " needs " + std::to_string(digits) + " hexadecimal digits";
      }
    } else if (c >= '1' && c <= '9') {
      problem_ = "back-references such as " + shown + " are not supported";
    } else if (std::isalnum(static_cast<unsigned char>(c)) != 0 &&
               kKnown.find(c) == std::string_view::npos) {
      problem_ = "there is no escape " + shown;
    }
  }

  void group() {
    if (!rest().starts_with('?') && !rest().starts_with('*')) return;
    for (const char* known : {"?:", "?=", "?!"}) {
      if (!rest().starts_with(known)) continue;
      at_ += 2;
      return;
    }
    problem_ = "of groups only (...), (?:...), (?=...) and (?!...) are known";
  }

  // "{2}", "{2,}" or "{2,3}".
  void counted() {
    at_ += count_while(rest(), &std::isdigit);
    const bool has_least = is_digit(text_[at_ - 1]);
    if (rest().starts_with(',')) {
      ++at_;
      at_ += count_while(rest(), &std::isdigit);
    }
    if (!has_least || !rest().starts_with('}')) {
      problem_ = "a '{' must begin a number of repetitions, or be written '\\{'";
      return;
    }
    ++at_;
    end_quantifier();
  }

  void end_quantifier() {
    if (rest().starts_with('?')) {
      ++at_;
    } else if (rest().starts_with('+')) {
      problem_ = "a '+' cannot follow another quantifier";
    }
  }

  std::string_view text_;
  std::size_t at_ = 0;
  bool in_class_ = false;
  std::string problem_;
};

std::string error_text(int code) {
  char text[120];
  const int length =
      pcre2_get_error_message(code, reinterpret_cast<unsigned char*>(text), sizeof text);
  return length < 0 ? "error " + std::to_string(code) : text;
}

[[noreturn]] void throw_not_valid(const std::string& pattern, const std::string& where,
                                  const std::string& problem) {
  throw_invalid(where, quote_name(pattern) + " is not a valid regex (ECMAScript without " +
                           "back-references): " + problem);
}

std::size_t size_of(const Code& code) {
  std::size_t bytes = 0;
  pcre2_pattern_info(code.get(), PCRE2_INFO_SIZE, &bytes);
  return bytes;
}

Code compile(const std::string& pattern, const std::string& where) {
  const std::string_view expression = std::string_view(pattern).substr(kPrefix.size());
  if (pattern.size() > kMaxLength) {
    throw_invalid(where, "a regex may have " + std::to_string(kMaxLength) +
                             " characters, this one has " + std::to_string(pattern.size()) + ": " +
                             quote_name(pattern));
  }
  const std::string problem = SyntaxCheck(expression).run();
  if (!problem.empty()) throw_not_valid(pattern, where, problem);
  const CompileContext context(allocated(pcre2_compile_context_create(nullptr)));
  // "." matches neither of the two.
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_ANYCRLF);
  constexpr std::uint32_t kOptions = PCRE2_ANCHORED | PCRE2_ENDANCHORED | PCRE2_ALLOW_EMPTY_CLASS |
                                     PCRE2_ALT_BSUX | PCRE2_DOLLAR_ENDONLY | PCRE2_NO_AUTO_CAPTURE |
                                     PCRE2_NEVER_BACKSLASH_C | PCRE2_NEVER_UCP | PCRE2_NEVER_UTF;
  int error = 0;
  std::size_t position = 0;
  Code code(pcre2_compile(reinterpret_cast<const unsigned char*>(expression.data()),
                          expression.size(), kOptions, &error, &position, context.get()));
  if (error == PCRE2_ERROR_HEAP_FAILED) throw std::bad_alloc();
  if (!code) {
    throw_not_valid(pattern, where,
                    error_text(error) + " at character " + std::to_string(position + 1));
  }
  const std::size_t bytes = size_of(code);
  if (bytes > kMaxCompiledBytes) {
    throw_not_valid(pattern, where,
                    "compiled it takes " + std::to_string(bytes) + " bytes, the limit is " +
                        std::to_string(kMaxCompiledBytes));
  }
  return code;
}

struct Compiled {
  Code code;
  MatchData data;
  std::size_t bytes;
};

// Models have thousands of layers and configs few patterns: compile each pattern once a thread.
const Compiled& compiled(const std::string& pattern) {
  thread_local std::unordered_map<std::string, Compiled> cache;
  const auto found = cache.find(pattern);
  if (found != cache.end()) return found->second;
  if (cache.size() >= kMaxRegexes) cache.clear();
  Code code = compile(pattern, "config");
  MatchData data(allocated(pcre2_match_data_create_from_pattern(code.get(), nullptr)));
  const std::size_t bytes = size_of(code);
  return cache.emplace(pattern, Compiled{std::move(code), std::move(data), bytes}).first->second;
}

std::size_t max_steps(const Compiled& regex, const std::string& name) {
  const std::size_t work_of_step = std::max(name.size(), regex.bytes / kBytesOfItem);
  return std::min(kMaxSteps, kMaxWork / std::max<std::size_t>(work_of_step, 1));
}

// For matches of up to `steps` steps.
pcre2_match_context* limited_context(std::size_t steps) {
  thread_local const MatchContext context(allocated(pcre2_match_context_create(nullptr)));
  pcre2_set_match_limit(context.get(), static_cast<std::uint32_t>(steps));
  pcre2_set_depth_limit(context.get(), static_cast<std::uint32_t>(steps));
  pcre2_set_heap_limit(context.get(), kMaxHeapKilobytes);
  return context.get();
}

}  // namespace

void validate_regex(const std::string& pattern, const std::string& where) {
  compile(pattern, where);
}

bool regex_matches(const std::string& pattern, const std::string& name) {
  if (name.size() > kMaxNameLength) {
    throw_invalid("config", "cannot match " + quote_name(pattern) + ": layer name " +
                                quote_name(name) + " has " + std::to_string(name.size()) +
                                " characters, the limit is " + std::to_string(kMaxNameLength));
  }
  const Compiled& regex = compiled(pattern);
  const std::size_t steps = max_steps(regex, name);
  const int result =
      pcre2_match(regex.code.get(), reinterpret_cast<const unsigned char*>(name.data()),
                  name.size(), 0, 0, regex.data.get(), limited_context(steps));
  if (result >= 0) return true;
  if (result == PCRE2_ERROR_NOMATCH) return false;
  if (result == PCRE2_ERROR_NOMEMORY) throw std::bad_alloc();
  if (result == PCRE2_ERROR_MATCHLIMIT || result == PCRE2_ERROR_DEPTHLIMIT ||
      result == PCRE2_ERROR_HEAPLIMIT) {
    throw_invalid("config", "matching " + quote_name(pattern) + " with layer name " +
                                quote_name(name) + " takes more than " + std::to_string(steps) +
                                " steps, the limit; a simpler expression or a glob is needed");
  }
  throw_invalid("config", "cannot match " + quote_name(pattern) + " with layer name " +
                              quote_name(name) + ": " + error_text(result));
}

}  // namespace hqq
