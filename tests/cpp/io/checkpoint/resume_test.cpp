// How an interrupted run goes on. Kills at random moments: tests/python/io/test_resume.py.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <thread>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "src/config/config_json.hpp"
#include "src/io/checkpoint/folder_lock.hpp"
#include "src/io/checkpoint/manifest.hpp"
#include "src/io/checkpoint/output_folder.hpp"
#include "src/io/checkpoint/source_files.hpp"
#include "tests/cpp/support/message_of.hpp"
#include "tests/cpp/support/model_test_util.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::AnyOf;
using testing::contents_of;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::message_of;
using testing::read_bytes;
using testing::same_contents;
using testing::save_model;
using testing::save_model_file;
using testing::sharded_model;
using testing::TempFolder;
using testing::write_bytes;

QuantizeCheckpointOptions with(bool force, bool resume) {
  QuantizeCheckpointOptions options;
  options.force = force;
  options.resume = resume;
  return options;
}

// A model "m", and "q.partial" of a run that was stopped after some shards.
class Resume : public ::testing::Test {
 protected:
  void SetUp() override {
    save_model(folder_ / "m", sharded_model());
    quantize_checkpoint(folder_ / "m", folder_ / "whole", {});
    expected_ = contents_of(folder_ / "whole");
  }

  // Stops when `shards` shards are in place.
  void interrupt(std::size_t shards, const HqqConfig& config) {
    QuantizeCheckpointOptions options;
    // The callback waits so long that it is called again before every matrix, and the writer is not
    // far behind.
    options.progress = [&](const Progress&) {
      std::this_thread::sleep_for(std::chrono::milliseconds(110));
      return finished().size() < shards;
    };
    try {
      quantize_checkpoint(folder_ / "m", folder_ / "q", config, options);
      FAIL() << "not interrupted";
    } catch (const Interrupted&) {
    }
  }
  nlohmann::json journal() const {
    const fs::path path = folder_ / "q.partial" / kJournalName;
    if (!fs::exists(path)) return nullptr;
    return nlohmann::json::parse(read_bytes(path));
  }
  nlohmann::json finished() const {
    const nlohmann::json json = journal();
    return json.is_null() ? nlohmann::json::object() : json["finished"];
  }
  // A partial folder with one finished shard, without waiting for a slow run.
  void make_partial(std::size_t shards = 1) {
    fs::create_directories(folder_ / "q.partial");
    nlohmann::ordered_json journal;
    journal["request"] = request();
    journal["finished"] = nlohmann::ordered_json::object();
    for (std::size_t i = 1; i <= shards; ++i) {
      const std::string name = "model-0000" + std::to_string(i) + "-of-00003.safetensors";
      fs::copy_file(folder_ / "whole" / name, folder_ / "q.partial" / name);
      const FileRecord record = read_manifest(folder_ / "whole").files.at(name);
      journal["finished"][name] = {{"size", record.size},
                                   {"xxh3_128", record.xxh3_128},
                                   {"extra", nlohmann::ordered_json::object()}};
    }
    write_bytes(folder_ / "q.partial" / kJournalName, journal.dump(2));
  }
  nlohmann::ordered_json request() const {
    nlohmann::ordered_json json;
    json["version"] = "0.1.0";
    json["format_version"] = 1;
    json["config"] = config_to_json(HqqConfig());
    json["importance"] = nullptr;
    json["source"] = fingerprint_source(Checkpoint(folder_ / "m"), false);
    return json;
  }

  std::string refusal(const HqqConfig& config = {}, const fs::path& importance = {}) {
    QuantizeCheckpointOptions options = with(false, true);
    options.importance = importance;
    const auto before = contents_of(folder_ / "q.partial");
    const std::string message = message_of<std::invalid_argument>(
        [&] { quantize_checkpoint(folder_ / "m", folder_ / "q", config, options); });
    EXPECT_TRUE(same_contents(contents_of(folder_ / "q.partial"), before))
        << "a refusal must not change anything";
    return message;
  }

  TempFolder folder_;
  std::map<std::string, std::string> expected_;
};

TEST_F(Resume, GoesOnFromFinishedShards) {
  HqqConfig config;
  config.defaults.nbits = BitWidth::k3;
  const QuantizeReport whole_report =
      quantize_checkpoint(folder_ / "m", folder_ / "other", config, with(false, false));
  interrupt(1, config);
  const std::size_t done = finished().size();
  ASSERT_GE(done, 1u);
  ASSERT_LT(done, 3u) << "interrupted too late to test anything";
  EXPECT_FALSE(fs::exists(folder_ / "q"));
  for (const auto& [name, content] : contents_of(folder_ / "q.partial")) {
    EXPECT_THAT(name, AnyOf(HasSubstr("model-0000"), kJournalName)) << "half-written";
    EXPECT_EQ(name.find("hqq-tmp"), std::string::npos);
  }

  QuantizeCheckpointOptions options = with(false, true);
  std::uint64_t total = 0;
  options.progress = [&](const Progress& progress) {
    if (progress.stage == "quantize") total = progress.total;
    return true;
  };
  const QuantizeReport report = quantize_checkpoint(folder_ / "m", folder_ / "q", config, options);
  EXPECT_EQ(total, whole_report.weights * (3 - done) / 3);
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), contents_of(folder_ / "other")));
  EXPECT_FALSE(fs::exists(folder_ / "q.partial"));
  // Statistics of the shards that were there come from the journal.
  ASSERT_EQ(report.layers.size(), whole_report.layers.size());
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    EXPECT_EQ(report.layers[i].stats.rms_error, whole_report.layers[i].stats.rms_error);
    EXPECT_EQ(report.layers[i].stats.relative_error, whole_report.layers[i].stats.relative_error);
  }
}

TEST_F(Resume, WithoutAnInterruptedRunIsAPlainRun) {
  quantize_checkpoint(folder_ / "m", folder_ / "q", {}, with(false, true));
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
}

TEST_F(Resume, ADamagedShardIsWrittenAgain) {
  make_partial(2);
  const fs::path shard = folder_ / "q.partial/model-00001-of-00003.safetensors";
  std::string bytes = read_bytes(shard);
  bytes[bytes.size() / 2] ^= 1;
  write_bytes(shard, bytes);
  write_bytes(folder_ / "q.partial/model-00002-of-00003.safetensors", "short");
  quantize_checkpoint(folder_ / "m", folder_ / "q", {}, with(false, true));
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
}

TEST_F(Resume, LeftoversAreRemoved) {
  make_partial(1);
  write_bytes(folder_ / "q.partial/.model.safetensors.0123.hqq-tmp", "half");
  write_bytes(folder_ / "q.partial/model-00003-of-00003.safetensors", "not in the journal");
  fs::create_directories(folder_ / "q.partial/sub");
  write_bytes(folder_ / "q.partial/sub/x", "x");
  quantize_checkpoint(folder_ / "m", folder_ / "q", {}, with(false, true));
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
}

TEST_F(Resume, WithoutAJournalItStartsOver) {
  make_partial(1);
  fs::remove(folder_ / "q.partial" / kJournalName);
  quantize_checkpoint(folder_ / "m", folder_ / "q", {}, with(false, true));
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
}

TEST_F(Resume, RefusesOtherSettings) {
  make_partial();
  HqqConfig config;
  config.defaults.nbits = BitWidth::k3;
  EXPECT_THAT(refusal(config), AllOf(HasSubstr("[resume] config.nbits was 4"),
                                     HasSubstr("is 3 now"), HasSubstr("force instead of resume")));
  config = {};
  config.dynamic_config = {{"self_attn.q_proj", std::nullopt}};
  EXPECT_THAT(refusal(config), HasSubstr("config.dynamic_config.self_attn.q_proj was absent"));
  config = {};
  config.skip_modules.push_back("q_proj");
  EXPECT_THAT(refusal(config), HasSubstr("config.skip_modules was"));
}

TEST_F(Resume, RefusesAnotherOrderOfRules) {
  HqqConfig config;
  config.dynamic_config = {{"*.q_proj", std::nullopt}, {"*.1.*", std::nullopt}};
  fs::remove_all(folder_ / "whole");
  quantize_checkpoint(folder_ / "m", folder_ / "whole", config);
  make_partial();
  auto json = nlohmann::ordered_json::parse(read_bytes(folder_ / "q.partial" / kJournalName));
  json["request"]["config"] = config_to_json(config);
  write_bytes(folder_ / "q.partial" / kJournalName, json.dump());
  std::swap(config.dynamic_config[0], config.dynamic_config[1]);
  EXPECT_THAT(refusal(config), HasSubstr("config.dynamic_config.order of keys"));
}

TEST_F(Resume, RefusesAnotherImportance) {
  make_partial();
  Tensor ones = Tensor::allocate(DType::kF32, {128});
  std::fill_n(ones.data<float>(), 128, 1.0f);
  save_model_file(folder_ / "i.safetensors", {{"model.layers.0.self_attn.q_proj", ones}});
  EXPECT_THAT(refusal({}, folder_ / "i.safetensors"), HasSubstr("importance was null"));
}

TEST_F(Resume, RefusesAnotherSource) {
  const std::string shard = "model-00003-of-00003.safetensors";
  make_partial();
  const fs::path path = folder_ / "m" / shard;
  const std::string bytes = read_bytes(path);
  const auto time = fs::last_write_time(path);

  fs::last_write_time(path, time + std::chrono::seconds(5));
  EXPECT_THAT(refusal(), HasSubstr("source." + shard + ".mtime_ns was"));
  fs::last_write_time(path, time);

  // A header of the same length: another name of a tensor.
  std::string renamed = bytes;
  const std::size_t at = renamed.find("down_proj");
  renamed.replace(at, 9, "dawn_proj");
  write_bytes(path, renamed);
  fs::last_write_time(path, time);
  // The index has to know it.
  const std::string index = read_bytes(folder_ / "m/model.safetensors.index.json");
  std::string new_index = index;
  new_index.replace(new_index.find("layers.4.mlp.down_proj"), 22, "layers.4.mlp.dawn_proj");
  write_bytes(folder_ / "m/model.safetensors.index.json", new_index);
  EXPECT_THAT(refusal(), HasSubstr("source." + shard + ".header_xxh3 was"));
  write_bytes(folder_ / "m/model.safetensors.index.json", index);
  write_bytes(path, bytes);
  fs::last_write_time(path, time);

  write_bytes(folder_ / "m/tokenizer.json", "{\"tokens\": {}}");
  EXPECT_THAT(refusal(), HasSubstr("source.tokenizer.json.xxh3 was"));
  write_bytes(folder_ / "m/tokenizer.json", "{\"tokens\": []}");

  write_bytes(folder_ / "m/new.txt", "");
  EXPECT_THAT(refusal(), AllOf(HasSubstr("source.new.txt was absent")));
  fs::remove(folder_ / "m/new.txt");

  const std::string config = read_bytes(folder_ / "m/config.json");
  write_bytes(folder_ / "m/config.json", "{}");
  EXPECT_THAT(refusal(), HasSubstr("source.config.json.size was"));
  write_bytes(folder_ / "m/config.json", config);

  quantize_checkpoint(folder_ / "m", folder_ / "q", {}, with(false, true));
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
}

TEST_F(Resume, RefusesAnotherVersion) {
  make_partial();
  const fs::path path = folder_ / "q.partial" / kJournalName;
  for (const auto& [key, message] : {std::pair("version", "version was \"0.0.9\""),
                                     std::pair("format_version", "format_version was \"0.0.9\"")}) {
    auto json = nlohmann::ordered_json::parse(read_bytes(path));
    json["request"][key] = "0.0.9";
    const std::string good = read_bytes(path);
    write_bytes(path, json.dump());
    EXPECT_THAT(refusal(), HasSubstr(message));
    write_bytes(path, good);
  }
}

TEST_F(Resume, RefusesABrokenJournal) {
  make_partial();
  for (const char* text : {"", "{}", "[]", "{\"request\": 1, \"finished\": []}",
                           R"({"request": 1, "finished": {"x": {"size": -1}}})",
                           R"({"request": 1, "finished": {"../x": {"size": 1, "xxh3_128": "",
                               "extra": null}}})"}) {
    write_bytes(folder_ / "q.partial" / kJournalName, text);
    EXPECT_THAT(refusal(), HasSubstr("hqq_cpp.journal.json")) << text;
  }
  quantize_checkpoint(folder_ / "m", folder_ / "q", {}, with(true, false));
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
}

TEST_F(Resume, AnInterruptedRunIsNotOverwrittenUnasked) {
  make_partial();
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { quantize_checkpoint(folder_ / "m", folder_ / "q", {}); }),
              AllOf(HasSubstr("q.partial"), HasSubstr("use resume to go on or force")));
  EXPECT_EQ(finished().size(), 1u);
  quantize_checkpoint(folder_ / "m", folder_ / "q", {}, with(true, false));
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
}

TEST_F(Resume, KilledAfterTheLastRename) {
  quantize_checkpoint(folder_ / "m", folder_ / "q", {});
  const QuantizeReport report =
      quantize_checkpoint(folder_ / "m", folder_ / "q", {}, with(false, true));
  EXPECT_TRUE(std::isnan(report.layers[0].stats.rms_error));
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
  // Other settings do not count as done.
  HqqConfig config;
  config.defaults.nbits = BitWidth::k2;
  EXPECT_THAT(message_of<std::invalid_argument>([&] {
                quantize_checkpoint(folder_ / "m", folder_ / "q", config, with(false, true));
              }),
              HasSubstr("exists; use force to replace it"));
}

TEST_F(Resume, OneProcessAtATime) {
  make_partial();
  {
    const FolderLock other(folder_ / "q", "other");
    EXPECT_THAT(refusal(), HasSubstr("another process is writing to"));
  }
  quantize_checkpoint(folder_ / "m", folder_ / "q", {}, with(false, true));
  EXPECT_THAT(folder_.names(), ElementsAre("m", "q", "whole")) << "the lock goes with the run";
}

TEST_F(Resume, StoppedBeforeTheFirstShardLeavesNothing) {
  QuantizeCheckpointOptions options;
  options.progress = [](const Progress&) { return false; };
  EXPECT_THROW(quantize_checkpoint(folder_ / "m", folder_ / "q", {}, options), Interrupted);
  EXPECT_THAT(folder_.names(), ElementsAre("m", "whole"));
}

TEST_F(Resume, AReplacementCanBeResumed) {
  save_model(folder_ / "q", sharded_model());
  make_partial(2);
  QuantizeCheckpointOptions options = with(true, true);
  std::uint64_t total = 0;
  options.progress = [&](const Progress& progress) {
    if (progress.stage == "quantize") total = progress.total;
    return true;
  };
  const QuantizeReport report = quantize_checkpoint(folder_ / "m", folder_ / "q", {}, options);
  EXPECT_EQ(total, report.weights / 3);
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
  EXPECT_THAT(folder_.names(), ElementsAre("m", "q", "whole"));
}

// Runs in a child process, because the limit cannot be raised again: no file may have more than
// `bytes`. Returns what the child had to say.
std::string quantize_with_file_limit(const fs::path& source, const fs::path& destination,
                                     rlim_t bytes) {
  int pipe_ends[2];
  if (::pipe(pipe_ends) != 0) return "no pipe";
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{bytes, bytes};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    std::string message = "nothing was thrown";
    try {
      QuantizeCheckpointOptions options;
      options.threads = 1;
      quantize_checkpoint(source, destination, {}, options);
    } catch (const std::system_error& error) {
      message = error.code().value() == EFBIG ? error.what() : "another error";
    } catch (const std::exception& error) {
      message = std::string("another type: ") + error.what();
    }
    [[maybe_unused]] const auto written = ::write(pipe_ends[1], message.data(), message.size());
    ::_exit(0);
  }
  ::close(pipe_ends[1]);
  std::string message(10000, '\0');
  const ssize_t count = ::read(pipe_ends[0], message.data(), message.size());
  message.resize(count > 0 ? static_cast<std::size_t>(count) : 0);
  ::close(pipe_ends[0]);
  int status = 0;
  ::waitpid(child, &status, 0);
  return message;
}

TEST_F(Resume, AFailedWriteIsReportedAndCanBeResumed) {
  // Too small for the third shard, which holds the head.
  const auto size = fs::file_size(folder_ / "whole/model-00003-of-00003.safetensors");
  ASSERT_GT(size, fs::file_size(folder_ / "whole/model-00001-of-00003.safetensors"));
  ASSERT_GT(size, fs::file_size(folder_ / "whole/model-00002-of-00003.safetensors"));
  EXPECT_THAT(quantize_with_file_limit(folder_ / "m", folder_ / "q", size - 1),
              AllOf(HasSubstr("cannot write"), HasSubstr("model-00003-of-00003")));
  EXPECT_FALSE(fs::exists(folder_ / "q"));
  EXPECT_EQ(finished().size(), 2u);
  quantize_checkpoint(folder_ / "m", folder_ / "q", {}, with(false, true));
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
}

TEST(FirstDifference, PathsAndValues) {
  using Json = nlohmann::ordered_json;
  const Json base = {{"a", 1}, {"b", {{"c", {1, 2}}, {"d", "x"}}}};
  EXPECT_FALSE(first_difference(base, base));
  Json other = base;
  other["b"]["c"] = {1, 3};
  const auto difference = first_difference(base, other);
  ASSERT_TRUE(difference);
  EXPECT_EQ(difference->path, "b.c");
  EXPECT_EQ(difference->before, "[1,2]");
  EXPECT_EQ(difference->now, "[1,3]");
  other = base;
  other["b"].erase("d");
  EXPECT_EQ(first_difference(base, other)->path, "b.d");
  EXPECT_EQ(first_difference(base, other)->now, "absent");
  EXPECT_EQ(first_difference(other, base)->before, "absent");
  EXPECT_EQ(first_difference(Json(nullptr), Json::object())->path, "");
}

}  // namespace
}  // namespace hqq
