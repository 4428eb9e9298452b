// Version of the library; CMakeLists.txt and pyproject.toml read it from here.
#pragma once

#define HQQ_VERSION_MAJOR 0
#define HQQ_VERSION_MINOR 1
#define HQQ_VERSION_PATCH 0
#define HQQ_VERSION_STRING "0.1.0"

namespace hqq {

inline constexpr const char* kVersion = HQQ_VERSION_STRING;
// Version of the file format (docs/format.md).
inline constexpr int kFormatVersion = 1;

}  // namespace hqq
