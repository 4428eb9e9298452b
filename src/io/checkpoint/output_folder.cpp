#include "src/io/checkpoint/output_folder.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "hqq/error.hpp"
#include "hqq/version.hpp"
#include "src/base/json.hpp"
#include "src/io/atomic_file.hpp"
#include "src/io/checkpoint/finished_folder.hpp"
#include "src/io/checkpoint/folder_lock.hpp"
#include "src/io/checkpoint/pipeline.hpp"
#include "src/io/checkpoint/source_files.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// "folder/" names the same folder as "folder", but has no file name to derive others from.
fs::path without_slash(const fs::path& path) {
  fs::path result = fs::absolute(path).lexically_normal();
  if (!result.has_filename()) result = result.parent_path();
  return result;
}

bool is_inside(const fs::path& path, const fs::path& folder) {
  const auto [end, ignored] = std::mismatch(folder.begin(), folder.end(), path.begin(), path.end());
  return end == folder.end();
}

bool is_there(const fs::path& path) { return fs::exists(fs::symlink_status(path)); }

// Whether a file of this name makes its folder a checkpoint, or what a run has left.
bool marks_folder(const fs::path& path) {
  const std::string name = path.filename().string();
  return name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") ||
         name == "config.json" || name.starts_with("hqq_cpp.") || is_temporary_file_name(name);
}

// What may be replaced on request: a folder with such a file, or an empty one. A mistyped name must
// not cost a home folder.
bool is_replaceable(const fs::path& path) {
  if (!fs::is_directory(fs::symlink_status(path))) return false;
  const fs::directory_iterator entries(path);
  return entries == fs::directory_iterator() ||
         std::any_of(entries, fs::directory_iterator(),
                     [](const auto& entry) { return marks_folder(entry.path()); });
}

// The files that mark a folder go last: one that a killed process leaves can still be replaced.
void remove_in_order(std::vector<fs::path> paths) {
  std::partition(paths.begin(), paths.end(),
                 [](const fs::path& path) { return !marks_folder(path); });
  for (const fs::path& path : paths) fs::remove_all(path);
}

void remove_folder(const fs::path& folder) {
  if (!is_there(folder)) return;
  std::vector<fs::path> paths;
  for (const auto& entry : fs::directory_iterator(folder)) paths.push_back(entry.path());
  remove_in_order(std::move(paths));
  fs::remove(folder);
}

// Atomic writes never leave a broken journal; somebody's editor may.
void check_journal(const Json& journal) {
  bool valid = journal.is_object() && journal.contains("request") && journal.contains("finished") &&
               journal["finished"].is_object();
  if (valid) {
    for (const auto& [name, shard] : journal["finished"].items()) {
      valid = valid && shard.is_object() && shard.contains("extra") && shard.contains("size") &&
              shard["size"].is_number_unsigned() && shard.contains("xxh3_128") &&
              shard["xxh3_128"].is_string() && name.find('/') == std::string::npos;
    }
  }
  if (!valid) {
    throw_format(kJournalName,
                 "it does not hold what a run writes into it; use force instead of resume to start "
                 "over");
  }
}

// For destructors.
void remove_if_possible(const fs::path& folder) noexcept {
  try {
    remove_folder(folder);
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
}

}  // namespace

OutputFolder::OutputFolder(const fs::path& source, const fs::path& destination, Options options)
    : options_(std::move(options)), destination_(without_slash(destination)) {
  if (!destination_.has_filename()) {
    throw_invalid(options_.where, quote_text(destination.string()) + " cannot be a destination");
  }
  partial_ = destination_;
  partial_ += ".partial";
  claim(source);
  if (already_complete_) return;
  claimed_ = true;
  try {
    open_journal();
    remove_leftovers();
    if (!options_.request.is_null()) write_journal();
  } catch (...) {
    // The destructor does not run; what was there stays as it was for another attempt.
    if (finished_.empty() && !options_.resume) remove_if_possible(partial_);
    throw;
  }
}

OutputFolder::~OutputFolder() {
  if (claimed_ && finished_.empty()) remove_if_possible(partial_);
}

void OutputFolder::claim(const fs::path& source) {
  const std::string& where = options_.where;
  const std::string shown = quote_text(destination_.string());
  const fs::path real_source = fs::canonical(source);
  for (const fs::path& target : {destination_, partial_}) {
    const fs::path real = fs::weakly_canonical(target);
    if (is_inside(real, real_source) || is_inside(real_source, real)) {
      throw_invalid(where, "destination " + quote_text(target.string()) + " and source " +
                               quote_text(source.string()) +
                               " overlap; choose a folder that is neither inside the other");
    }
  }
  fs::create_directories(destination_.parent_path());
  lock_ = std::make_unique<FolderLock>(destination_, where);
  const bool partial_exists = is_there(partial_);
  if (is_there(destination_)) {
    if (options_.resume && is_result_of(destination_, options_.request)) {
      check_finished(destination_, source, options_.progress);
      // Killed between the last rename and the clean-up after it.
      if (partial_exists) check_replaceable(partial_);
      remove_folder(partial_);
      already_complete_ = true;
      return;
    }
    if (!options_.force) {
      throw_invalid(where, "destination " + shown + " exists; use force to replace it");
    }
    check_replaceable(destination_);
  }
  if (partial_exists && !options_.resume && !options_.force) {
    throw_invalid(where, quote_text(partial_.string()) + " is left from an interrupted run; use " +
                             (options_.request.is_null() ? "force to start over"
                                                         : "resume to go on or force to start "
                                                           "over"));
  }
  if (partial_exists) check_replaceable(partial_);
  fs::create_directories(partial_);
}

void OutputFolder::check_replaceable(const fs::path& path) const {
  if (is_replaceable(path)) return;
  throw_invalid(options_.where,
                quote_text(path.string()) +
                    " is not a checkpoint folder (no config.json, no .safetensors), "
                    "so nothing in it is touched; remove it or choose another name");
}

void OutputFolder::open_journal() {
  const fs::path path = partial_ / kJournalName;
  if (!options_.resume || options_.request.is_null() || !fs::exists(path)) return;
  const Json journal = parse_json(read_text_file(path), kJournalName);
  check_journal(journal);
  if (const auto difference = first_difference(journal["request"], options_.request)) {
    throw_invalid("resume", difference->path + " was " + difference->before +
                                " in the interrupted run and is " + difference->now +
                                " now; repeat the run as it was, or use force instead of resume to "
                                "start over");
  }
  std::uint64_t total = 0;
  for (const Json& shard : journal["finished"]) total += shard.value("size", std::uint64_t{0});
  ProgressMeter meter("resume", total, options_.progress);
  for (const auto& [name, shard] : journal["finished"].items()) {
    const FileRecord record{shard.at("size").get<std::uint64_t>(),
                            shard.at("xxh3_128").get<std::string>()};
    const fs::path file = partial_ / name;
    if (!fs::is_regular_file(file) || fs::file_size(file) != record.size) continue;
    const std::string hash = hash_file(file, [&, &name = name](std::uint64_t bytes) {
      meter.advance(bytes);
      meter.report(name);
    });
    if (hash != record.xxh3_128) continue;
    finished_[name] = shard;
    files_[name] = record;
  }
}

void OutputFolder::remove_leftovers() {
  std::vector<fs::path> leftovers;
  for (const auto& entry : fs::directory_iterator(partial_)) {
    const std::string name = entry.path().filename().string();
    if (!finished_.contains(name)) leftovers.push_back(entry.path());
  }
  remove_in_order(std::move(leftovers));
}

void OutputFolder::write_journal() {
  Json journal;
  journal["request"] = options_.request;
  journal["finished"] = finished_;
  write_file_atomically(partial_ / kJournalName, journal.dump(2) + "\n");
}

const Json* OutputFolder::finished_shard(const std::string& name) const {
  const auto shard = finished_.find(name);
  return shard == finished_.end() ? nullptr : &shard->at("extra");
}

void OutputFolder::shard_finished(const std::string& name, FileRecord record, Json extra) {
  if (!options_.request.is_null()) {
    finished_[name] = {
        {"size", record.size}, {"xxh3_128", record.xxh3_128}, {"extra", std::move(extra)}};
    write_journal();
  }
  files_[name] = std::move(record);
}

void OutputFolder::write_file(const std::string& name, const std::string& text) {
  write_file_atomically(partial_ / name, text);
  files_[name] = {text.size(), xxh3_hex(std::as_bytes(std::span(text)))};
}

void OutputFolder::copy_file(const fs::path& from, const std::string& name) {
  const fs::path to = partial_ / name;
  fs::create_directories(to.parent_path());
  std::uint64_t size = 0;
  const int fd = open_regular_file(from, size);
  const std::shared_ptr<void> closer(nullptr, [fd](void*) { ::close(fd); });
  AtomicFile file(to);
  std::vector<std::byte> chunk(std::size_t{1} << 20);
  while (true) {
    const ssize_t count = ::read(fd, chunk.data(), chunk.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_errno(options_.where, "read", from);
    if (count == 0) break;
    file.write(std::span(chunk).first(static_cast<std::size_t>(count)));
  }
  file.commit();
  files_[name] = {file.size(), file.hash()};
}

void OutputFolder::commit() {
  if (!options_.force && is_there(destination_)) {
    throw_invalid(options_.where, "destination " + quote_text(destination_.string()) +
                                      " has appeared meanwhile; move it away and resume");
  }
  fs::remove(partial_ / kJournalName);
  sync_directory(partial_);
  swap_in();
  claimed_ = false;
  sync_directory(destination_.parent_path());
}

void OutputFolder::swap_in() {
  if (!is_there(destination_)) {
    fs::rename(partial_, destination_);
    return;
  }
#if defined(__linux__) && defined(RENAME_EXCHANGE)
  // Old and new change places: at no moment is there none under the name.
  if (::renameat2(AT_FDCWD, partial_.c_str(), AT_FDCWD, destination_.c_str(), RENAME_EXCHANGE) ==
      0) {
    remove_old(partial_);
    return;
  }
#endif
  fs::path old = partial_;
  old += ".old";
  if (is_there(old)) check_replaceable(old);
  fs::remove_all(old);
  fs::rename(destination_, old);
  fs::rename(partial_, destination_);
  remove_old(old);
}

void OutputFolder::remove_old(const fs::path& old) {
  // From here on the new folder is in place, whatever happens.
  claimed_ = false;
  try {
    remove_folder(old);
  } catch (const std::system_error& error) {
    throw std::system_error(error.code(),
                            "[" + options_.where + "] " + quote_text(destination_.string()) +
                                " is written and in place, but what it has replaced cannot "
                                "be removed from " +
                                quote_text(old.string()) + "; remove it yourself");
  }
}

}  // namespace hqq
