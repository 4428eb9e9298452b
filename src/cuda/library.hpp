// libhqq_cuda: found and loaded on first use, so that everything else works without it and without
// a driver.
#pragma once

#include <string>
#include <vector>

#include "cuda/api.hpp"

namespace hqq::cuda {

// Throws CudaError unless the library was found, fits this build, and a driver that is new enough
// drives at least one GPU. What failed once fails again: nothing is tried twice.
const Api& library();

// Throws CudaError unless there is a device of this index that is new enough.
void require_device(int device);

// What was found, for people. Throws nothing.
struct DeviceDescription {
  int index = 0;
  DeviceInfo info{};
  std::string problem;  // empty: it can be used
};
struct Description {
  std::string library;  // path; empty: none was loaded
  std::string problem;  // the text of the error that library() throws; empty: none
  DriverInfo driver{};  // zeros: unknown
  std::vector<DeviceDescription> devices;
};
Description describe();

// ---- Steps of the above ------------------------------------------------------------------------

// Where a library is looked for, in order: `override` alone if it is not empty, else beside
// `module` (the file that holds this code), in ../lib, and where the system looks.
std::vector<std::string> library_candidates(const std::string& override, const std::string& module);

struct LoadedLibrary {
  const Api* api = nullptr;
  std::string path;
};
// The first candidate that exists; throws CudaError if none does, or that one is no library of this
// build. A name without '/' counts as existing when the system finds it.
LoadedLibrary load_library(const std::vector<std::string>& candidates);

// Throw CudaError when the table is another build's, there is no driver for it or no GPU, or a GPU
// is too old.
void check_version(const Api* api, const std::string& path);
void check_driver(const Api& api);
void check_device(const Api& api, int device);

}  // namespace hqq::cuda
