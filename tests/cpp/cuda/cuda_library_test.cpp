// How the CUDA library is looked for and judged; what happens in a whole process is in
// tests/python/cuda/test_cuda.py.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "hqq/error.hpp"
#include "src/cuda/library.hpp"
#include "tests/cpp/support/io_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq::cuda {
namespace {

using hqq::testing::message_of;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// What the functions of the table below report.
struct Machine {
  int driver = 13000, runtime = 13000, devices = 1;
  int major = 9, minor = 0;
  Status status = Status::kOk;
} machine;

Api fake_api() {
  machine = {};
  Api api{};
  api.version = kApiVersion;
  api.min_compute = 75;
  api.error_text = [] { return "file.cu:1: call(): text"; };
  api.driver_info = [](DriverInfo* out) {
    *out = {machine.driver, machine.runtime};
    return machine.status;
  };
  api.device_count = [](int* out) {
    *out = machine.devices;
    return machine.status;
  };
  api.device_info = [](int, DeviceInfo* out) {
    std::strcpy(out->name, "Fake GPU");
    out->compute_major = machine.major;
    out->compute_minor = machine.minor;
    return machine.status;
  };
  return api;
}

template <class Function>
std::string refusal(Function function) {
  return message_of<CudaError>(function);
}

TEST(CudaLibrary, IsLookedForBesideTheModuleThenInLibThenByTheSystem) {
  EXPECT_THAT(library_candidates("", "/a/bin/hqq-cpp"),
              ElementsAre("/a/bin/libhqq_cuda.so", "/a/lib/libhqq_cuda.so", "libhqq_cuda.so"));
  EXPECT_THAT(library_candidates("/x/y.so", "/a/bin/hqq-cpp"), ElementsAre("/x/y.so"));
  EXPECT_THAT(library_candidates("", ""), ElementsAre("libhqq_cuda.so"));
}

TEST(CudaLibrary, ThatIsNowhereIsNamedWithEveryPlace) {
  EXPECT_EQ(
      refusal([] { load_library({"/no/a.so", "libhqq_no_such_library.so"}); }),
      "[cuda] there is no CUDA library (looked for /no/a.so, libhqq_no_such_library.so on the "
      "system's path); build with HQQ_CUDA=ON, or set HQQ_CUDA_LIBRARY to its path");
}

TEST(CudaLibrary, ThatIsAnotherFileIsRefused) {
  const hqq::testing::TempFolder folder;
  const std::string text = (folder.path() / "text.so").string();
  std::ofstream(text) << "not a library";
  EXPECT_THAT(refusal([&] { load_library({"/no/a.so", text}); }), HasSubstr("cannot load " + text));
  EXPECT_THAT(refusal([] { load_library({"libc.so.6"}); }),
              HasSubstr("libc.so.6 has no function hqq_cuda_api"));
}

TEST(CudaLibrary, OfAnotherBuildIsRefused) {
  Api api = fake_api();
  EXPECT_NO_THROW(check_version(&api, "a.so"));
  api.version = kApiVersion + 1;
  EXPECT_EQ(refusal([&] { check_version(&api, "a.so"); }),
            "[cuda] a.so has interface " + std::to_string(kApiVersion + 1) +
                ", but this build needs " + std::to_string(kApiVersion) +
                "; use the one that was built together with it");
  EXPECT_THAT(refusal([] { check_version(nullptr, "a.so"); }), HasSubstr("interface none"));
}

TEST(CudaDriver, MustBeThereAndOfTheSameMajorVersion) {
  const Api api = fake_api();
  machine.runtime = 13020;
  machine.driver = 13000;
  EXPECT_NO_THROW(check_driver(api));
  machine.driver = 14000;
  EXPECT_NO_THROW(check_driver(api));
  machine.driver = 12090;
  EXPECT_EQ(
      refusal([&] { check_driver(api); }),
      "[cuda] the NVIDIA driver supports CUDA 12.9, but the library was built with CUDA 13.2; "
      "update the driver, or build with CUDA 12");
  machine.driver = 0;
  EXPECT_EQ(refusal([&] { check_driver(api); }),
            "[cuda] no NVIDIA driver was found; install one that supports CUDA 13.0, or use device "
            "cpu");
}

TEST(CudaDriver, MustFindAGpu) {
  const Api api = fake_api();
  machine.devices = 0;
  EXPECT_THAT(refusal([&] { check_driver(api); }), HasSubstr("finds no GPU"));
  machine.status = Status::kCudaError;
  EXPECT_THAT(refusal([&] { check_driver(api); }), HasSubstr("file.cu:1: call(): text"));
}

TEST(CudaDevice, MustExistAndBeNewEnough) {
  const Api api = fake_api();
  EXPECT_NO_THROW(check_device(api, 0));
  EXPECT_EQ(refusal([&] { check_device(api, 1); }),
            "[cuda] there is no device cuda:1; there is 1 GPU, cuda:0");
  machine.devices = 4;
  EXPECT_THAT(refusal([&] { check_device(api, 4); }), HasSubstr("there are 4 GPUs, up to cuda:3"));
  EXPECT_THAT(refusal([&] { check_device(api, -1); }), HasSubstr("no device cuda:-1"));
  machine.major = 7;
  machine.minor = 5;
  EXPECT_NO_THROW(check_device(api, 3));
  machine.minor = 2;
  EXPECT_EQ(refusal([&] { check_device(api, 3); }),
            "[cuda] cuda:3, Fake GPU, has compute capability 7.2; this build has kernels for 7.5 "
            "and newer "
            "(HQQ_CUDA_ARCHITECTURES)");
}

}  // namespace
}  // namespace hqq::cuda
