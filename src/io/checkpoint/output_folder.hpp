// A folder that appears under its name only when it is whole, and whose interrupted construction
// can be resumed.
#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "hqq/checkpoint.hpp"
#include "src/io/checkpoint/folder_lock.hpp"
#include "src/io/checkpoint/manifest.hpp"

namespace hqq {

inline constexpr const char* kJournalName = "hqq_cpp.journal.json";

class OutputFolder {
 public:
  struct Options {
    std::string where;  // tag of messages: "quantize", ...
    bool force = false;
    bool resume = false;
    // Everything the result depends on; a run that resumes must have an equal one. null: no journal
    // is kept and nothing can be resumed.
    nlohmann::ordered_json request;
    ProgressCallback progress;
  };

  // Claims "<destination>.partial". Throws std::invalid_argument when the destination exists
  // (without force), when it holds no checkpoint (even with force: it may be anything), when it
  // overlaps with the source, when an interrupted run is in the way (without force or resume), when
  // another process is at it, and, on resume, naming the first field of the request that has
  // changed.
  OutputFolder(const std::filesystem::path& source, const std::filesystem::path& destination,
               Options options);
  // Removes the partial folder unless it holds finished shards that a later run can resume from.
  ~OutputFolder();
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;

  // On resume: the interrupted run had got to its very end, the destination is whole.
  bool already_complete() const { return already_complete_; }
  // Where to write.
  const std::filesystem::path& path() const { return partial_; }

  // A shard that an interrupted run has finished (its hash was checked), with its `extra`, or
  // nullptr.
  const nlohmann::ordered_json* finished_shard(const std::string& name) const;
  // Records a shard that is in place. `extra` is kept in the journal.
  void shard_finished(const std::string& name, FileRecord record, nlohmann::ordered_json extra);

  void write_file(const std::string& name, const std::string& text);
  void copy_file(const std::filesystem::path& from, const std::string& name);
  const std::map<std::string, FileRecord>& files() const { return files_; }

  // Gives the folder its name. With force an old destination is swapped out in one step and
  // removed.
  void commit();

 private:
  void claim(const std::filesystem::path& source);
  void check_replaceable(const std::filesystem::path& path) const;
  void open_journal();
  void write_journal();
  void remove_leftovers();
  void swap_in();
  void remove_old(const std::filesystem::path& old);

  Options options_;
  std::filesystem::path destination_;
  std::filesystem::path partial_;
  std::unique_ptr<FolderLock> lock_;
  nlohmann::ordered_json finished_ = nlohmann::ordered_json::object();
  std::map<std::string, FileRecord> files_;
  bool claimed_ = false;
  bool already_complete_ = false;
};

}  // namespace hqq
