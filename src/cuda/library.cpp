#include "src/cuda/library.hpp"

#include <dlfcn.h>
#include <link.h>

#include <cstdlib>
#include <filesystem>
#include <mutex>

#include "hqq/error.hpp"

namespace hqq::cuda {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLibraryName = "libhqq_cuda.so";
constexpr const char* kEntryName = "hqq_cuda_api";

[[noreturn]] void fail(const std::string& text) { throw CudaError("[cuda] " + text); }

// "13.0" for 13000.
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string compute_text(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

void expect_ok(const Api& api, Status status, const std::string& what) {
  if (status != Status::kOk) fail(what + ": " + api.error_text());
}

// The executable or shared library that contains this function.
std::string this_module() {
  Dl_info info{};
  link_map* map = nullptr;
  void* address = reinterpret_cast<void*>(&this_module);
  if (::dladdr1(address, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0) return "";
  // The name of the executable is what argv[0] says, which need not be a path.
  const bool executable = map == nullptr || map->l_name == nullptr || *map->l_name == '\0';
  std::error_code error;
  const fs::path path = fs::canonical(executable ? "/proc/self/exe" : map->l_name, error);
  return error ? "" : path.string();
}

struct Found {
  LoadedLibrary library;
  std::string problem;
};

const Found& find_once() {
  static const Found found = [] {
    Found result;
    try {
      const char* override = std::getenv("HQQ_CUDA_LIBRARY");
      result.library =
          load_library(library_candidates(override != nullptr ? override : "", this_module()));
      check_driver(*result.library.api);
    } catch (const CudaError& error) {
      result.problem = error.what();
    }
    return result;
  }();
  return found;
}

}  // namespace

std::vector<std::string> library_candidates(const std::string& override,
                                            const std::string& module) {
  if (!override.empty()) return {override};
  std::vector<std::string> candidates;
  if (!module.empty()) {
    const fs::path folder = fs::path(module).parent_path();
    candidates.push_back((folder / kLibraryName).string());
    candidates.push_back((folder.parent_path() / "lib" / kLibraryName).string());
  }
  candidates.emplace_back(kLibraryName);
  return candidates;
}

LoadedLibrary load_library(const std::vector<std::string>& candidates) {
  std::string tried;
  for (const std::string& path : candidates) {
    const bool by_name = path.find('/') == std::string::npos;
    std::error_code error;
    const bool exists = by_name || fs::exists(path, error);
    tried += (tried.empty() ? "" : ", ") + (by_name ? path + " on the system's path" : path);
    if (!exists) continue;
    void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      const char* text = ::dlerror();
      if (by_name) continue;
      fail("cannot load " + path + ": " + (text != nullptr ? text : "unknown error"));
    }
    using Entry = const Api* (*)();
    const auto entry = reinterpret_cast<Entry>(::dlsym(handle, kEntryName));
    if (entry == nullptr) {
      ::dlclose(handle);
      fail(path + " has no function " + kEntryName + "; it is not the CUDA library of hqq.cpp");
    }
    const Api* api = entry();
    check_version(api, path);
    return {api, path};
  }
  fail("there is no CUDA library (looked for " + tried +
       "); build with HQQ_CUDA=ON, or set HQQ_CUDA_LIBRARY to its path");
}

void check_version(const Api* api, const std::string& path) {
  if (api != nullptr && api->version == kApiVersion) return;
  fail(path + " has interface " + (api == nullptr ? "none" : std::to_string(api->version)) +
       ", but this build needs " + std::to_string(kApiVersion) +
       "; use the one that was built together with it");
}

void check_driver(const Api& api) {
  DriverInfo driver{};
  expect_ok(api, api.driver_info(&driver), "the driver does not say its version");
  if (driver.driver_version == 0) {
    fail("no NVIDIA driver was found; install one that supports CUDA " +
         version_text(driver.runtime_version / 1000 * 1000) + ", or use device cpu");
  }
  if (driver.driver_version / 1000 < driver.runtime_version / 1000) {
    fail("the NVIDIA driver supports CUDA " + version_text(driver.driver_version) +
         ", but the library was built with CUDA " + version_text(driver.runtime_version) +
         "; update the driver, or build with CUDA " + std::to_string(driver.driver_version / 1000));
  }
  int count = 0;
  expect_ok(api, api.device_count(&count), "cannot list the GPUs");
  if (count == 0) fail("the NVIDIA driver finds no GPU; CUDA_VISIBLE_DEVICES may hide it");
}

void check_device(const Api& api, int device) {
  int count = 0;
  expect_ok(api, api.device_count(&count), "cannot list the GPUs");
  if (device < 0 || device >= count) {
    fail("there is no device cuda:" + std::to_string(device) + "; there " +
         (count == 1
              ? "is 1 GPU, cuda:0"
              : "are " + std::to_string(count) + " GPUs, up to cuda:" + std::to_string(count - 1)));
  }
  DeviceInfo info{};
  expect_ok(api, api.device_info(device, &info), "cuda:" + std::to_string(device));
  if (info.compute_major * 10 + info.compute_minor >= api.min_compute) return;
  fail("cuda:" + std::to_string(device) + ", " + info.name + ", has compute capability " +
       compute_text(info.compute_major, info.compute_minor) + "; this build has kernels for " +
       compute_text(api.min_compute / 10, api.min_compute % 10) +
       " and newer (HQQ_CUDA_ARCHITECTURES)");
}

const Api& library() {
  const Found& found = find_once();
  if (!found.problem.empty()) throw CudaError(found.problem);
  return *found.library.api;
}

void require_device(int device) {
  static std::mutex mutex;
  static std::vector<int> known;
  const Api& api = library();
  const std::lock_guard lock(mutex);
  for (const int index : known) {
    if (index == device) return;
  }
  check_device(api, device);
  known.push_back(device);
}

Description describe() {
  Description result;
  const Found& found = find_once();
  result.library = found.library.path;
  result.problem = found.problem;
  const Api* api = found.library.api;
  if (api == nullptr || api->driver_info(&result.driver) != Status::kOk) return result;
  int count = 0;
  if (api->device_count(&count) != Status::kOk) return result;
  for (int index = 0; index < count; ++index) {
    DeviceDescription device;
    device.index = index;
    try {
      check_device(*api, index);
    } catch (const CudaError& error) {
      device.problem = error.what();
    }
    if (api->device_info(index, &device.info) != Status::kOk) device.info = {};
    result.devices.push_back(device);
  }
  return result;
}

bool is_available() {
  for (const DeviceDescription& device : describe().devices) {
    if (find_once().problem.empty() && device.problem.empty()) return true;
  }
  return false;
}

}  // namespace hqq::cuda
