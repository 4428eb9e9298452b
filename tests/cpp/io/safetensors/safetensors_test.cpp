#include "hqq/safetensors.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <thread>

#include "hqq/error.hpp"
#include "src/io/atomic_file.hpp"
#include "src/io/safetensors/header.hpp"
#include "tests/cpp/support/io_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::message_of;
using testing::read_bytes;
using ::testing::StartsWith;
using testing::TempFolder;
using testing::write_bytes;

constexpr DType kAllDTypes[] = {DType::kBool,   DType::kU8,  DType::kI8,  DType::kF8E5M2,
                                DType::kF8E4M3, DType::kI16, DType::kU16, DType::kF16,
                                DType::kBF16,   DType::kI32, DType::kU32, DType::kF32,
                                DType::kF64,    DType::kI64, DType::kU64};

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

Tensor patterned(DType dtype, std::vector<std::int64_t> shape, int seed) {
  Tensor tensor = Tensor::allocate(dtype, std::move(shape));
  for (std::size_t i = 0; i < tensor.nbytes(); ++i) {
    tensor.buffer.data[i] = static_cast<std::byte>((i * 37 + i / 251 + seed) & 0xFF);
  }
  return tensor;
}

bool same_bytes(const Tensor& a, const Tensor& b) {
  return a.nbytes() == b.nbytes() && std::memcmp(a.buffer.data, b.buffer.data, a.nbytes()) == 0;
}

// Length, header, data.
std::string file_of(const std::string& header, const std::string& data = "") {
  std::string length(8, '\0');
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i) & 0xFF);
  return length + header + data;
}

const std::string kSmallHeader = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";

TEST(Safetensors, RoundTripOfEveryDType) {
  const TempFolder folder;
  const auto path = folder / "all.safetensors";
  std::vector<Tensor> tensors;
  std::vector<std::pair<std::string, const Tensor*>> named;
  for (const DType dtype : kAllDTypes) {
    tensors.push_back(patterned(dtype, {3, 5}, static_cast<int>(tensors.size())));
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    named.emplace_back(std::string(dtype_name(tensors[i].dtype)), &tensors[i]);
  }
  const std::map<std::string, std::string> metadata = {{"format", "pt"}, {"k\"\n", "\xC3\xA9"}};
  save_safetensors(path, named, metadata);

  const SafetensorsFile file(path);
  EXPECT_EQ(file.metadata(), metadata);
  EXPECT_EQ(file.file_size(), std::filesystem::file_size(path));
  EXPECT_EQ(file.path(), path);
  ASSERT_EQ(file.tensors().size(), tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorInfo* info = file.find(named[i].first);
    ASSERT_EQ(info, &file.tensors()[i]) << named[i].first;
    EXPECT_EQ(info->dtype, tensors[i].dtype);
    EXPECT_EQ(info->shape, tensors[i].shape);
    for (const Tensor& read : {file.read(*info), file.map(*info)}) {
      EXPECT_EQ(read.dtype, tensors[i].dtype);
      EXPECT_EQ(read.shape, tensors[i].shape);
      EXPECT_TRUE(same_bytes(read, tensors[i])) << named[i].first;
      // One byte of bool before them puts later tensors at odd places; pointers are aligned anyway.
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(read.buffer.data) % dtype_size(read.dtype), 0u);
    }
  }
  EXPECT_EQ(file.find("no such tensor"), nullptr);
}

TEST(Safetensors, ScalarsEmptyTensorsAndAnEmptyFile) {
  const TempFolder folder;
  const auto path = folder / "a.safetensors";
  const Tensor scalar = patterned(DType::kF64, {}, 1);
  const Tensor none = patterned(DType::kF32, {0}, 2);
  const Tensor wide = patterned(DType::kI64, {4, 0, 1'000'000'000}, 3);
  save_safetensors(path, {{"first", &none}, {"", &scalar}, {"last", &wide}});
  const SafetensorsFile file(path);
  ASSERT_EQ(file.tensors().size(), 3u);
  EXPECT_EQ(file.tensors()[0].name, "first");
  EXPECT_EQ(file.tensors()[2].shape, wide.shape);
  EXPECT_TRUE(same_bytes(file.read(*file.find("")), scalar));
  for (const char* name : {"first", "last"}) {
    EXPECT_TRUE(file.read(*file.find(name))) << "present, though empty";
    EXPECT_EQ(file.map(*file.find(name)).nbytes(), 0u);
  }
  save_safetensors(path, {});
  EXPECT_THAT(SafetensorsFile(path).tensors(), IsEmpty());
}

TEST(Safetensors, TensorsComeInTheOrderOfTheirData) {
  const TempFolder folder;
  const auto path = folder / "a.safetensors";
  write_bytes(path, file_of(R"({"z":{"dtype":"U8","shape":[1],"data_offsets":[3,4]},)"
                            R"("y":{"shape":[3],"data_offsets":[0,3],"dtype":"U8"},)"
                            R"("e":{"dtype":"U8","shape":[0],"data_offsets":[3,3]},)"
                            R"("__metadata__":{}}     )",
                            "abcd"));
  const SafetensorsFile file(path);
  std::vector<std::string> names;
  for (const TensorInfo& info : file.tensors()) names.push_back(info.name);
  EXPECT_THAT(names, ElementsAre("y", "e", "z"));
  EXPECT_EQ(*file.read(*file.find("z")).data<char>(), 'd');
}

TEST(Safetensors, ReadsPartsOfATensor) {
  const TempFolder folder;
  const auto path = folder / "a.safetensors";
  write_bytes(path, file_of(R"({"p":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                            R"("q":{"dtype":"U8","shape":[5],"data_offsets":[2,7]}})",
                            "ppabcde"));
  const SafetensorsFile file(path);
  const TensorInfo& info = *file.find("q");
  char out[3] = {};
  file.read(info, 1, std::as_writable_bytes(std::span(out)));
  EXPECT_EQ(std::string(out, 3), "bcd");
  EXPECT_NO_THROW(file.read(info, 5, {}));
  const auto read = [&](const TensorInfo& from, std::uint64_t offset) {
    return message_of<FormatError>(
        [&] { file.read(from, offset, std::as_writable_bytes(std::span(out))); });
  };
  EXPECT_THAT(read(info, 3), HasSubstr("3 bytes from byte 3 leave tensor \"q\""));
  EXPECT_THAT(read(info, 6), HasSubstr("leave tensor \"q\""));
  EXPECT_THAT(read(info, ~std::uint64_t{0} - 1), HasSubstr("leave tensor \"q\""));
  // Entries of another file may point anywhere.
  TensorInfo foreign = info;
  foreign.end = 8;
  EXPECT_THAT(read(foreign, 0), HasSubstr("at bytes 2 to 8 of 7"));
  EXPECT_THROW(file.read(foreign), FormatError);
  EXPECT_THROW(file.map(foreign), FormatError);
  foreign.begin = 9;
  EXPECT_THROW(file.map(foreign), FormatError);
}

TEST(Safetensors, MapOutlivesItsFile) {
  const TempFolder folder;
  const auto path = folder / "a.safetensors";
  const Tensor big = patterned(DType::kF32, {64, 1'000}, 5);
  const Tensor small = patterned(DType::kF32, {3}, 6);
  save_safetensors(path, {{"small", &small}, {"big", &big}});
  Tensor mapped;
  {
    SafetensorsFile file(path);
    SafetensorsFile moved = std::move(file);
    mapped = moved.map(*moved.find("big"));
  }
  std::filesystem::remove(path);
  EXPECT_TRUE(same_bytes(mapped, big));
}

TEST(Safetensors, MisalignedTensorsAreCopiedInsteadOfMapped) {
  const TempFolder folder;
  const auto path = folder / "a.safetensors";
  const Tensor odd = patterned(DType::kU8, {3}, 1);
  const Tensor big = patterned(DType::kF64, {100'000}, 2);
  save_safetensors(path, {{"odd", &odd}, {"big", &big}});
  const SafetensorsFile file(path);
  const Tensor mapped = file.map(*file.find("big"));
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(mapped.buffer.data) % alignof(double), 0u);
  EXPECT_TRUE(same_bytes(mapped, big));
}

TEST(Safetensors, ManyThreadsReadOneFile) {
  const TempFolder folder;
  const auto path = folder / "a.safetensors";
  std::vector<Tensor> tensors;
  std::vector<std::pair<std::string, const Tensor*>> named;
  for (int i = 0; i < 8; ++i) tensors.push_back(patterned(DType::kF32, {50, 101}, i));
  for (int i = 0; i < 8; ++i) named.emplace_back(std::to_string(i), &tensors[i]);
  save_safetensors(path, named);
  const SafetensorsFile file(path);
  std::vector<int> wrong(8, 0);
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < 50; ++round) {
        const int i = (t + round) % 8;
        wrong[t] += !same_bytes(file.read(*file.find(named[i].first)), tensors[i]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(wrong, ::testing::Each(0));
}

TEST(Safetensors, FileTruncatedWhileOpen) {
  const TempFolder folder;
  const auto path = folder / "a.safetensors";
  const Tensor tensor = patterned(DType::kU8, {100'000}, 1);
  save_safetensors(path, {{"t", &tensor}});
  const SafetensorsFile file(path);
  const TensorInfo& info = *file.find("t");
  std::filesystem::resize_file(path, 50'000);
  const std::string message = message_of<FormatError>([&] { file.read(info); });
  EXPECT_THAT(message, HasSubstr("the file ends at byte 50000, but it had "));
  EXPECT_THAT(message, HasSubstr(path.string()));
  // Reading the map would end the process.
  EXPECT_EQ(message_of<FormatError>([&] { file.map(info); }), message);
  std::byte first[10];
  EXPECT_NO_THROW(file.read(info, 0, first));
}

TEST(Safetensors, WhatIsNoRegularFile) {
  const TempFolder folder;
  const auto open = [](const std::filesystem::path& path) { SafetensorsFile file(path); };
  EXPECT_THAT(message_of<FormatError>([&] { open(folder.path()); }),
              HasSubstr("is a folder, but a regular file is needed"));
  ASSERT_EQ(::mkfifo((folder / "p.safetensors").c_str(), 0600), 0);
  EXPECT_THAT(message_of<FormatError>([&] { open(folder / "p.safetensors"); }),
              HasSubstr("is a pipe, but a regular file is needed"));
  try {
    open(folder / "gone.safetensors");
    FAIL() << "opened a file that does not exist";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), ENOENT);
    EXPECT_THAT(error.what(), HasSubstr("gone.safetensors"));
  }
}

TEST(SafetensorsHeader, HugeClaimsAllocateNothing) {
  const TempFolder folder;
  // Both lengths are legal on their own; only the size of the file says that they lie.
  write_bytes(folder / "a",
              file_of(kSmallHeader)
                  .replace(0, 8, std::string("\x00\xE1\xF5\x05", 4) + std::string(4, '\0')));
  EXPECT_THAT(message_of<FormatError>([&] { SafetensorsFile file(folder / "a"); }),
              HasSubstr("claims 100000000 bytes, but only 54 follow"));
}

TEST(SafetensorsHeader, MessagesStayShort) {
  const std::string name(200'000, 'n');
  const auto message = [](const std::string& header) {
    return message_of<FormatError>([&] { parse_safetensors_header(header, 0, "f"); });
  };
  std::string dims = "1";
  for (int i = 0; i < 20'000; ++i) dims += ",1";
  for (const std::string& header :
       {"{\"" + name + "\":1}", "{\"" + name, "{\"t\":{\"dtype\":\"" + name + "\"}}",
        "{\"t\":{\"dtype\":\"U8\",\"shape\":[" + dims + "],\"data_offsets\":[0,2]}}",
        "{\"t\":{\"shape\":[1." + std::string(100'000, '0') + "]}}"}) {
    EXPECT_LT(message(header).size(), 500u);
  }
}

// Every file of the corpus is refused, each with a message of its own that names the file.
TEST(SafetensorsHostile, EveryFileIsRefused) {
  const std::filesystem::path folder =
      std::filesystem::path(HQQ_SOURCE_DIR) / "tests/golden/hostile";
  const auto cases = nlohmann::json::parse(read_bytes(folder / "expected.json"));
  std::set<std::string> messages;
  for (const auto& [name, expected] : cases.items()) {
    if (!name.ends_with(".safetensors")) continue;
    SCOPED_TRACE(name);
    const std::string message =
        message_of<FormatError>([&] { SafetensorsFile file(folder / name); });
    EXPECT_THAT(message, StartsWith("[safetensors] \"" + (folder / name).string() + "\": "));
    EXPECT_THAT(message, HasSubstr(expected["message"].get<std::string>()));
    EXPECT_EQ(message.find('\n'), std::string::npos);
    messages.insert(expected["message"]);
    messages.insert(name);
  }
  EXPECT_GE(messages.size(), 2u * 90) << "the corpus lost files, or two share a message";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    EXPECT_TRUE(name == "expected.json" || cases.contains(name)) << name << " is not expected";
  }
}

TEST(SafetensorsWriter, LayoutIsDeterministicAndAligned) {
  const TempFolder folder;
  for (int extra = 0; extra < 9; ++extra) {
    const auto path = folder / "a.safetensors";
    const std::string name(static_cast<std::size_t>(extra), 'x');
    SafetensorsWriter writer(path, {{name, DType::kU8, {3}}, {"a", DType::kBF16, {1, 2}}},
                             {{"z", "1"}, {"y", "2"}});
    writer.write(bytes_of("12"));
    writer.write({});
    writer.write(bytes_of("3abcd"));
    writer.finish();
    const std::string bytes = read_bytes(path);
    std::string header = R"({"__metadata__":{"y":"2","z":"1"},")";
    header += name;
    header += R"(":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)";
    header += R"("a":{"dtype":"BF16","shape":[1,2],"data_offsets":[3,7]}})";
    EXPECT_EQ(bytes.substr(8, header.size()), header);
    EXPECT_EQ((bytes.size() - 7) % 8, 0u);
    EXPECT_EQ(bytes, file_of(header + std::string((8 - header.size() % 8) % 8, ' '), "123abcd"));
    EXPECT_EQ(writer.file_size(), bytes.size());
    EXPECT_EQ(writer.file_hash(), xxh3_hex(bytes_of(bytes)));
  }
}

TEST(SafetensorsWriter, WrongNumberOfBytes) {
  const TempFolder folder;
  const auto path = folder / "a.safetensors";
  {
    SafetensorsWriter writer(path, {{"a", DType::kF32, {2}}}, {});
    writer.write(bytes_of("1234567"));
    EXPECT_THAT(message_of<std::logic_error>([&] { writer.finish(); }),
                HasSubstr("the tensors take 8 bytes, but 7 were written"));
    EXPECT_THAT(message_of<std::logic_error>([&] { writer.write(bytes_of("89")); }),
                HasSubstr("the tensors take 8 bytes, but 9 were written"));
    EXPECT_THROW(writer.file_hash(), std::logic_error);
    EXPECT_FALSE(std::filesystem::exists(path));
  }
  EXPECT_THAT(folder.names(), IsEmpty());
}

TEST(SafetensorsWriter, InvalidTensorsAreFoundBeforeAFileExists) {
  const TempFolder folder;
  const auto error = [&](std::vector<TensorInfo> tensors,
                         const std::map<std::string, std::string>& metadata = {}) {
    const std::string message = message_of<std::invalid_argument>(
        [&] { SafetensorsWriter writer(folder / "a.safetensors", tensors, metadata); });
    EXPECT_THAT(folder.names(), IsEmpty());
    EXPECT_THAT(message, StartsWith("[safetensors"));
    return message;
  };
  EXPECT_THAT(error({{"a", DType::kU8, {1}}, {"b", DType::kU8, {1}}, {"a", DType::kU8, {2}}}),
              HasSubstr("tensor \"a\" is given twice"));
  EXPECT_THAT(error({{"__metadata__", DType::kU8, {1}}}), HasSubstr("__metadata__ is reserved"));
  EXPECT_THAT(error({{"a", DType::kU8, {-1}}}), HasSubstr("negative"));
  EXPECT_THAT(error({{"a", DType::kU8, {1LL << 40, 1LL << 40}}}), HasSubstr("more elements than"));
  EXPECT_THAT(error({{"a", DType::kF64, {1LL << 61}}}), HasSubstr("larger than 2^63 bytes"));
  EXPECT_THAT(error({{"a", DType::kU8, {(1LL << 62)}}, {"b", DType::kU8, {(1LL << 62)}}}),
              HasSubstr("larger than 2^63 bytes"));
  EXPECT_THAT(error({{"\xFF", DType::kU8, {1}}}), HasSubstr("not UTF-8"));
  EXPECT_THAT(error({}, {{"k", "\xFF"}}), HasSubstr("not UTF-8"));
  EXPECT_THAT(error({}, {{"k", std::string(kMaxHeaderBytes, 'v')}}),
              HasSubstr("more than the limit of 100000000"));
}

TEST(SafetensorsWriter, SaveChecksBuffers) {
  const TempFolder folder;
  Tensor tensor = Tensor::allocate(DType::kF32, {4});
  tensor.shape = {5};
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { save_safetensors(folder / "a.safetensors", {{"w", &tensor}}); }),
              HasSubstr("tensor \"w\" [5] takes 20 bytes, but its buffer has 16"));
  EXPECT_THAT(folder.names(), IsEmpty());
}

TEST(SafetensorsWriter, KilledBeforeFinishAndDiskFull) {
  const TempFolder folder;
  const auto path = folder / "a.safetensors";
  const pid_t child = ::fork();
  if (child == 0) {
    SafetensorsWriter writer(path, {{"a", DType::kU8, {4}}}, {});
    writer.write(bytes_of("1234"));
    ::raise(SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_FALSE(std::filesystem::exists(path));
  for (const std::string& name : folder.names()) std::filesystem::remove(folder / name);

  const pid_t full = ::fork();
  if (full == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {4'096, 4'096};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    int code = 1;
    try {
      const Tensor tensor = patterned(DType::kU8, {10'000}, 1);
      save_safetensors(path, {{"a", &tensor}});
    } catch (const std::system_error& error) {
      code = std::strstr(error.what(), "a.safetensors") != nullptr ? 0 : 2;
    }
    ::_exit(code);
  }
  ASSERT_EQ(::waitpid(full, &status, 0), full);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_THAT(folder.names(), IsEmpty());
}

}  // namespace
}  // namespace hqq
