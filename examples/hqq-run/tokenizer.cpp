#include "tokenizer.hpp"

#include <algorithm>
#include <hqq/error.hpp>

namespace {

constexpr const char* kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

using Pieces = std::vector<icu::UnicodeString>;

std::string to_utf8(const icu::UnicodeString& text) {
  std::string result;
  return text.toUTF8String(result);
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
    int end = 0;
    while (U_SUCCESS(status) && matcher->find(status)) {
      const int start = matcher->start(status);
      if (start > end) smaller.emplace_back(piece, end, start - end);
      end = matcher->end(status);
      if (end > start) smaller.emplace_back(piece, start, end - start);
    }
    if (end < piece.length()) smaller.emplace_back(piece, end);
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
    added_[content] = token.at("id");
    bytes_[token.at("id")] = content;
  }
  // From the last to the first: a token before those that it begins with.
  for (auto token = added_.rbegin(); token != added_.rend(); ++token) {
    any += (any.empty() ? "\\Q" : "|\\Q") + token->first + "\\E";
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
      for (const Json& id : token.at("ids")) prefix_.push_back(id);
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
  for (const auto& [name, token] : model.at("vocab").items()) {
    bytes_[token] = bytes_of(name);
    vocabulary_[bytes_[token]] = token;
  }
  for (const Json& merge : model.at("merges")) {
    Json pair = merge;  // ["a", "b"] or "a b"
    if (merge.is_string()) {
      const std::string text = merge;
      const std::size_t space = text.find(' ');
      pair = {text.substr(0, space), text.substr(std::min(space, text.size() - 1) + 1)};
    }
    const std::string left = bytes_of(pair.at(0)), right = bytes_of(pair.at(1));
    for (const std::string& bytes : {left, right, left + right}) {
      if (!vocabulary_.contains(bytes)) hqq::throw_invalid("merges", "there is no token " + bytes);
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
  while (true) {
    std::pair best{merges_.size(), std::int64_t{0}};
    std::size_t where = 0;
    for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto merge = merges_.find({parts[i], parts[i + 1]});
      if (merge == merges_.end() || merge->second >= best) continue;
      best = merge->second;
      where = i;
    }
    if (best.first == merges_.size()) break;
    parts[where] = best.second;
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(where) + 1);
  }
  tokens.insert(tokens.end(), parts.begin(), parts.end());
}

std::string Tokenizer::decode(std::int64_t token) const {
  return bytes_.contains(token) ? bytes_.at(token) : "";
}
