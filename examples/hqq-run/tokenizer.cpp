#include "tokenizer.hpp"

#include <algorithm>
#include <cctype>
#include <hqq/error.hpp>
#include <limits>

namespace {

constexpr const char* kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

using Pieces = std::vector<icu::UnicodeString>;

std::string to_utf8(const icu::UnicodeString& text) {
  std::string result;
  return text.toUTF8String(result);
}

// Characters that mean something in an expression mean themselves.
std::string escaped(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (std::ispunct(static_cast<unsigned char>(c))) result += '\\';
    result += c;
  }
  return result;
}

std::int64_t token_of(const Json& json, const std::string& key) {
  return integer(json, key, 0, std::numeric_limits<std::int32_t>::max());
}

void check(UErrorCode status, const std::string& what) {
  if (U_FAILURE(status)) hqq::throw_invalid(what, std::string("ICU: ") + u_errorName(status));
}

std::unique_ptr<icu::RegexPattern> compile(const std::string& expression) {
  UErrorCode status = U_ZERO_ERROR;
  UParseError where;
  std::unique_ptr<icu::RegexPattern> pattern(
      icu::RegexPattern::compile(icu::UnicodeString::fromUTF8(expression), where, status));
  check(status, expression);
  return pattern;
}

// Cuts pieces before and after every match.
Pieces cut(const icu::RegexPattern& pattern, const Pieces& pieces) {
  UErrorCode status = U_ZERO_ERROR;
  Pieces smaller;
  for (const icu::UnicodeString& piece : pieces) {
    const std::unique_ptr<icu::RegexMatcher> matcher(pattern.matcher(piece, status));
    check(status, "tokenizer");
    // A unit is about a millisecond. Without limits a bad expression goes on for ever.
    matcher->setTimeLimit(1000 + piece.length() / 100, status);
    matcher->setStackLimit(1 << 24, status);
    int end = 0;
    while (U_SUCCESS(status) && matcher->find(status)) {
      const int start = matcher->start(status);
      if (start > end) smaller.emplace_back(piece, end, start - end);
      end = matcher->end(status);
      if (end > start) smaller.emplace_back(piece, start, end - start);
    }
    if (end < piece.length()) smaller.emplace_back(piece, end);
  }
  if (status == U_REGEX_TIME_OUT || status == U_REGEX_STACK_OVERFLOW) {
    hqq::throw_invalid("tokenizer", "its expression " + shown(to_utf8(pattern.pattern())) +
                                        " takes too long for this text: " + u_errorName(status));
  }
  check(status, "tokenizer");
  return smaller;
}

// GPT-2 writes every byte as a printable character: itself, or the next one from U+0100 on.
std::unordered_map<char16_t, char> make_alphabet() {
  std::unordered_map<char16_t, char> alphabet;
  char16_t next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
    alphabet[printable ? static_cast<char16_t>(byte) : next++] = static_cast<char>(byte);
  }
  return alphabet;
}

std::string bytes_of(const std::string& name) {
  static const std::unordered_map<char16_t, char> alphabet = make_alphabet();
  const icu::UnicodeString characters = icu::UnicodeString::fromUTF8(name);
  std::string bytes;
  for (int i = 0; i < characters.length(); ++i) {
    if (!alphabet.contains(characters[i])) return name;  // an added token
    bytes += alphabet.at(characters[i]);
  }
  return bytes;
}

// The members of a Sequence, or the one step; nothing if there is none.
std::vector<Json> steps(const Json& file, const char* kind, const char* members) {
  const Json step = file.value(kind, Json{{"type", "Sequence"}, {members, Json::array()}});
  if (step.at("type") != "Sequence") return {step};
  return step.at(members).get<std::vector<Json>>();
}

}  // namespace

void Tokenizer::read(const Json& json) {
  read_model(json.at("model"));
  std::string any;
  for (const Json& token : json.value("added_tokens", Json::array())) {
    for (const char* key : {"single_word", "lstrip", "rstrip"}) expect(token, key, false, {false});
    const std::string& content = token.at("content").get_ref<const std::string&>();
    if (content.empty()) hqq::throw_invalid("added_tokens", "a token must not be empty");
    bytes_[added_[content] = token_of(token, "id")] = content;
  }
  // From the last to the first: a token before those that it begins with.
  for (auto token = added_.rbegin(); token != added_.rend(); ++token) {
    if (!any.empty()) any += '|';
    any += escaped(token->first);
  }
  added_pattern_ = compile(any.empty() ? "(?!)" : any);
  for (const Json& step : steps(json, "normalizer", "normalizers")) {
    expect(step, "type", {}, {"NFC"});
    UErrorCode status = U_ZERO_ERROR;
    normalizer_ = icu::Normalizer2::getNFCInstance(status);
    check(status, "NFC");
  }
  bool byte_level = false;
  for (const Json& step : steps(json, "pre_tokenizer", "pretokenizers")) {
    expect(step, "type", {}, {"ByteLevel", "Digits", "Split"});
    if (step.at("type") == "Digits") {
      splits_.push_back(compile(step.at("individual_digits") == true ? R"(\p{N})" : R"(\p{N}+)"));
    } else if (step.at("type") == "Split") {
      expect(step, "behavior", {}, {"Isolated"});
      splits_.push_back(compile(step.at("pattern").at("Regex")));
    } else {
      expect(step, "add_prefix_space", true, {false});
      if (step.value("use_regex", true)) splits_.push_back(compile(kGpt2));
      byte_level = true;
    }
  }
  if (!byte_level) hqq::throw_invalid("pre_tokenizer", "there is no ByteLevel");
  for (const Json& step : steps(json, "post_processor", "processors")) {
    expect(step, "type", {}, {"ByteLevel", "TemplateProcessing"});
    for (const Json& part : step.value("single", Json::array())) {
      if (part.contains("Sequence")) break;
      const Json& token = step.at("special_tokens").at(part.at("SpecialToken").at("id"));
      for (const Json& id : token.at("ids")) prefix_.push_back(token_of({{"id", id}}, "id"));
    }
  }
}

void Tokenizer::read_model(const Json& model) {
  expect(model, "type", "BPE", {"BPE"});
  expect(model, "byte_fallback", false, {false});
  for (const char* key : {"unk_token", "continuing_subword_prefix", "end_of_word_suffix"}) {
    expect(model, key, "", {""});
  }
  ignore_merges_ = model.value("ignore_merges", false);
  const Json& names = model.at("vocab");
  for (const auto& [name, number] : names.items()) {
    const std::int64_t token = token_of(names, name);
    bytes_[token] = bytes_of(name);
    vocabulary_[bytes_[token]] = token;
  }
  for (const Json& merge : model.at("merges")) {
    Json pair = merge;  // ["a", "b"] or "a b"
    if (merge.is_string()) {
      const std::string text = merge;
      const std::size_t space = std::min(text.find(' '), text.size());
      pair = {text.substr(0, space), text.substr(std::min(space + 1, text.size()))};
    }
    if (pair.size() != 2) hqq::throw_invalid("merges", shown(merge) + " is no pair of tokens");
    const std::string left = bytes_of(pair.at(0)), right = bytes_of(pair.at(1));
    for (const std::string& bytes : {left, right, left + right}) {
      if (!vocabulary_.contains(bytes)) {
        hqq::throw_invalid("merges", shown(merge) + " needs a token that is not in the vocabulary");
      }
    }
    merges_.try_emplace({vocabulary_[left], vocabulary_[right]}, merges_.size(),
                        vocabulary_[left + right]);
  }
}

Tokens Tokenizer::encode(const std::string& text) const {
  Tokens tokens = prefix_;
  for (const icu::UnicodeString& part :
       cut(*added_pattern_, {icu::UnicodeString::fromUTF8(text)})) {
    if (const auto token = added_.find(to_utf8(part)); token != added_.end()) {
      tokens.push_back(token->second);
      continue;
    }
    UErrorCode status = U_ZERO_ERROR;
    Pieces pieces{normalizer_ ? normalizer_->normalize(part, status) : part};
    check(status, "normalizer");
    for (const Pattern& split : splits_) pieces = cut(*split, pieces);
    for (const icu::UnicodeString& piece : pieces) encode_piece(to_utf8(piece), tokens);
  }
  return tokens;
}

// Merges the neighbours of lowest rank until there is nothing to merge.
void Tokenizer::encode_piece(const std::string& bytes, Tokens& tokens) const {
  const auto whole = vocabulary_.find(bytes);
  if (ignore_merges_ && whole != vocabulary_.end()) return tokens.push_back(whole->second);
  Tokens parts;
  for (const char byte : bytes) {
    const auto found = vocabulary_.find(std::string(1, byte));
    if (found != vocabulary_.end()) parts.push_back(found->second);  // else it is left out
  }
  // Neighbours of each part; a part that was merged into the one before it is no longer among them.
  const std::size_t end = parts.size();
  std::vector<std::size_t> next(end), previous(end);
  for (std::size_t i = 0; i < end; ++i) {
    next[i] = i + 1;
    previous[i] = i == 0 ? end : i - 1;
  }
  std::set<std::pair<std::size_t, std::size_t>> queue;  // rank of a merge, place of its first part
  const auto merge_at = [&](std::size_t i) {
    return i == end || next[i] == end ? merges_.end() : merges_.find({parts[i], parts[next[i]]});
  };
  const auto add = [&](std::size_t i) {
    if (merge_at(i) != merges_.end()) queue.insert({merge_at(i)->second.first, i});
  };
  const auto remove = [&](std::size_t i) {
    if (merge_at(i) != merges_.end()) queue.erase({merge_at(i)->second.first, i});
  };
  for (std::size_t i = 0; i < end; ++i) add(i);
  while (!queue.empty()) {
    const std::size_t first = queue.begin()->second, second = next[first];
    const std::int64_t merged = merge_at(first)->second.second;
    for (const std::size_t i : {previous[first], first, second}) remove(i);
    parts[first] = merged;
    next[first] = next[second];
    if (next[first] != end) previous[next[first]] = first;
    for (const std::size_t i : {previous[first], first}) add(i);
  }
  for (std::size_t i = 0; i < end; i = next[i]) tokens.push_back(parts[i]);
}

std::string Tokenizer::decode(std::int64_t token) const {
  return bytes_.contains(token) ? bytes_.at(token) : "";
}
