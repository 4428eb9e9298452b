// What the fuzz targets share: claims that abort, errors that are sentences, and a folder to write
// in.
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

namespace hqq::fuzzing {

// libFuzzer keeps the input of a process that aborts.
inline void require(bool condition, std::string_view claim) {
  if (condition) return;
  std::cerr << "not so: " << claim << '\n';
  std::abort();
}

// Whatever the input is, a message is one that somebody can read.
constexpr std::size_t kLongestMessage = 2000;

// Runs `action`; true if it went through. Errors that an input may cause (FormatError is an
// std::invalid_argument) are fine, any other ends the process.
template <class Action>
bool accepted(Action&& action) {
  try {
    action();
    return true;
  } catch (const std::invalid_argument& error) {
    require(std::string_view(error.what()).size() <= kLongestMessage, "messages are short");
  } catch (const std::system_error& error) {
    require(std::string_view(error.what()).size() <= kLongestMessage, "messages are short");
  }
  return false;
}

inline std::string_view text_of(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

// A folder in memory, of this process.
class Scratch {
 public:
  Scratch() {
    std::string pattern = std::filesystem::is_directory("/dev/shm") ? "/dev/shm" : "/tmp";
    pattern += "/hqq-fuzz-XXXXXX";
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = pattern;
  }
  ~Scratch() { clear(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }

  void clear() const { std::filesystem::remove_all(path_); }
  // The file and the folders above it.
  void write(std::string_view name, std::string_view bytes) const {
    const std::filesystem::path path = path_ / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream file(path, std::ios::binary);
    file << bytes;
    require(bool(file.flush()), "files can be written");
  }

 private:
  std::filesystem::path path_;
};

// The one of this process. Targets clear it before an input, so that a failure leaves its files.
inline const Scratch& scratch() {
  static const Scratch folder;
  return folder;
}

}  // namespace hqq::fuzzing
