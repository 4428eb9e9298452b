# Every dependency: the installed package if there is one, else a pinned commit of its repository.
include(FetchContent)
option(HQQ_FETCH "Fetch the dependencies that are not installed" ON)
# A Python wheel and a project around this one want the build, not the install rules.
set(hqq_install_default OFF)
if(CMAKE_SOURCE_DIR STREQUAL CMAKE_CURRENT_SOURCE_DIR AND NOT SKBUILD)
  set(hqq_install_default ON)
endif()
option(HQQ_INSTALL "Install the library, its headers and the CMake package hqq" ${hqq_install_default})

# hqq_dependency(<package> [VERSION <least>] TARGET <target> DEBIAN <package> GIT <url> COMMIT <sha>)
# After it <target> exists. A full commit hash pins the content: git checks it.
function(hqq_dependency package)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "VERSION;TARGET;DEBIAN;GIT;COMMIT" "")
  # A project around this one may have brought it already.
  if(TARGET ${arg_TARGET})
    return()
  endif()
  find_package(${package} ${arg_VERSION} QUIET)
  if(TARGET ${arg_TARGET})
    return()
  endif()
  if(NOT HQQ_FETCH)
    message(FATAL_ERROR "${package} ${arg_VERSION} is not installed and HQQ_FETCH is OFF. Install it "
                        "(Debian package ${arg_DEBIAN}) or name its folder in CMAKE_PREFIX_PATH.")
  endif()
  message(STATUS "${package} is not installed (Debian package ${arg_DEBIAN}): fetching ${arg_GIT}")

  # Variables, not cache entries: they end with this function. The policies let option() and
  # set(CACHE) respect them; the last line admits projects older than CMake 3.5.
  set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
  set(CMAKE_POLICY_DEFAULT_CMP0126 NEW)
  set(CMAKE_POLICY_VERSION_MINIMUM 3.5)
  set(CMAKE_CXX_VISIBILITY_PRESET default)
  set(CMAKE_VISIBILITY_INLINES_HIDDEN OFF)
  set(BUILD_SHARED_LIBS OFF)
  set(BUILD_TESTING OFF)
  set(EIGEN_BUILD_DOC OFF)
  set(EIGEN_BUILD_PKGCONFIG OFF)
  set(HWY_ENABLE_CONTRIB OFF)
  set(HWY_ENABLE_EXAMPLES OFF)
  set(HWY_ENABLE_TESTS OFF)
  set(HWY_ENABLE_INSTALL ${HQQ_INSTALL})
  set(JSON_BuildTests OFF)
  set(JSON_Install ${HQQ_INSTALL})
  set(INSTALL_GTEST OFF)
  set(BENCHMARK_ENABLE_TESTING OFF)
  set(BENCHMARK_ENABLE_INSTALL OFF)
  # Excluded: neither built nor installed beyond what hqq uses of it.
  set(exclude)
  if(NOT HQQ_INSTALL OR package MATCHES "CLI11|GTest|rapidcheck|benchmark")
    set(exclude EXCLUDE_FROM_ALL)
  endif()
  set(flags)
  if(CMAKE_VERSION VERSION_GREATER_EQUAL 3.28)
    set(flags SYSTEM ${exclude})
  endif()
  # A name of our own: GoogleTest has a project gtest inside, whose gtest_SOURCE_DIR must stay its own.
  string(TOLOWER hqq_${package} content)
  FetchContent_Declare(${content} ${flags}
    GIT_REPOSITORY ${arg_GIT} GIT_TAG ${arg_COMMIT} GIT_SUBMODULES "")
  if(flags)
    FetchContent_MakeAvailable(${content})
  else()
    # Older releases cannot exclude what they make available.
    FetchContent_GetProperties(${content})
    if(NOT ${content}_POPULATED)
      FetchContent_Populate(${content})
      add_subdirectory(${${content}_SOURCE_DIR} ${${content}_BINARY_DIR} ${exclude})
    endif()
  endif()
  if(NOT TARGET ${arg_TARGET})
    string(REGEX REPLACE ".*::" "" plain ${arg_TARGET})
    add_library(${arg_TARGET} ALIAS ${plain})
  endif()
endfunction()

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)

hqq_dependency(Eigen3 VERSION 3.4 TARGET Eigen3::Eigen DEBIAN libeigen3-dev
  GIT https://gitlab.com/libeigen/eigen.git
  COMMIT 3147391d946bb4b6c68edd901f2add6ac1f31f8c)  # 3.4.0
hqq_dependency(nlohmann_json VERSION 3.11 TARGET nlohmann_json::nlohmann_json
  DEBIAN nlohmann-json3-dev
  GIT https://github.com/nlohmann/json.git
  COMMIT 9cca280a4d0ccf0c08f47a99aa71d1b0e52f8d03)  # 3.11.3
hqq_dependency(hwy VERSION 1.0.3 TARGET hwy::hwy DEBIAN libhwy-dev
  GIT https://github.com/google/highway.git
  COMMIT 457c891775a7397bdb0376bb1031e6e027af1c48)  # 1.2.0

# xxHash, headers only. XXH3 is stable since 0.8.
find_path(HQQ_XXHASH_INCLUDE_DIR xxhash.h)
if(HQQ_XXHASH_INCLUDE_DIR)
  file(STRINGS ${HQQ_XXHASH_INCLUDE_DIR}/xxhash.h hqq_xxhash_minor REGEX "XXH_VERSION_MINOR +[0-9]")
  if(hqq_xxhash_minor MATCHES "MINOR +[0-7]$")
    set(HQQ_XXHASH_INCLUDE_DIR "HQQ_XXHASH_INCLUDE_DIR-NOTFOUND")
  endif()
endif()
if(NOT HQQ_XXHASH_INCLUDE_DIR)
  if(NOT HQQ_FETCH)
    message(FATAL_ERROR "xxhash.h is not installed and HQQ_FETCH is OFF. Install it (Debian package "
                        "libxxhash-dev) or name its folder in HQQ_XXHASH_INCLUDE_DIR.")
  endif()
  message(STATUS "xxhash.h is not installed (Debian package libxxhash-dev): fetching it")
  # SOURCE_SUBDIR names no folder, so its CMake files are not run.
  FetchContent_Declare(xxhash
    GIT_REPOSITORY https://github.com/Cyan4973/xxHash.git
    GIT_TAG bbb27a5efb85b92a0486cf361a8635715a53f6ba  # 0.8.2
    SOURCE_SUBDIR none)
  FetchContent_MakeAvailable(xxhash)
  set(HQQ_XXHASH_INCLUDE_DIR ${xxhash_SOURCE_DIR})
endif()
add_library(hqq_xxhash INTERFACE)
target_include_directories(hqq_xxhash SYSTEM INTERFACE
  $<BUILD_INTERFACE:${HQQ_XXHASH_INCLUDE_DIR}>)
target_compile_definitions(hqq_xxhash INTERFACE $<BUILD_INTERFACE:XXH_INLINE_ALL>)

include(HqqPcre2)

if(HQQ_BUILD_CLI OR HQQ_BUILD_EXAMPLES OR HQQ_PYTHON)
  hqq_dependency(CLI11 VERSION 2.1 TARGET CLI11::CLI11 DEBIAN libcli11-dev
    GIT https://github.com/CLIUtils/CLI11.git
    COMMIT f4d0731cebb123ff0ace712c099dffbcd2c58e5a)  # 2.4.1
endif()

if(HQQ_BUILD_TESTS)
  hqq_dependency(GTest TARGET GTest::gmock DEBIAN "libgtest-dev and libgmock-dev"
    GIT https://github.com/google/googletest.git
    COMMIT f8d7d77c06936315286eb55f8de22cd23c188571)  # 1.14.0
  hqq_dependency(rapidcheck TARGET rapidcheck DEBIAN librapidcheck-dev
    GIT https://github.com/emil-e/rapidcheck.git
    COMMIT ff6af6fc683159deb51c543b065eba14dfcf329b)
endif()

if(HQQ_BUILD_BENCHMARKS)
  hqq_dependency(benchmark VERSION 1.7 TARGET benchmark::benchmark DEBIAN libbenchmark-dev
    GIT https://github.com/google/benchmark.git
    COMMIT 344117638c8ff7e239044fd0fa7085839fc03021)  # 1.8.3
endif()
