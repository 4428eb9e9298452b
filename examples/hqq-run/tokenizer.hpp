// Byte-level BPE from a tokenizer.json: that of GPT-2, Llama 3, Qwen and SmolLM.
#pragma once

#include <unicode/normalizer2.h>
#include <unicode/regex.h>

#include <map>
#include <memory>
#include <unordered_map>

#include "config.hpp"

class Tokenizer {
 public:
  // Throws hqq::FormatError for a broken file, and for what is not known here.
  explicit Tokenizer(const std::filesystem::path& file) {
    read_json(file, 100'000'000, [this](const Json& json) { read(json); });
  }

  Tokens encode(const std::string& text) const;
  // The bytes of a token, maybe a part of a character; empty for an unknown token.
  std::string decode(std::int64_t token) const;

 private:
  using Pattern = std::unique_ptr<icu::RegexPattern>;

  void read(const Json& json);
  void read_model(const Json& model);
  void encode_piece(const std::string& bytes, Tokens& tokens) const;

  std::unordered_map<std::string, std::int64_t> vocabulary_;  // bytes -> token
  std::unordered_map<std::int64_t, std::string> bytes_;       // token -> bytes
  // Neighbours -> rank, and the token that they become.
  std::map<std::pair<std::int64_t, std::int64_t>, std::pair<std::size_t, std::int64_t>> merges_;
  bool ignore_merges_ = false;                 // for pieces that are tokens
  std::map<std::string, std::int64_t> added_;  // tokens wherever they are in a text
  Pattern added_pattern_;
  const icu::Normalizer2* normalizer_ = nullptr;
  std::vector<Pattern> splits_;
  Tokens prefix_;
};
