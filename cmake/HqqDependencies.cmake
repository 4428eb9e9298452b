# Every dependency: the installed package if there is one.
find_package(Threads REQUIRED)
find_package(Eigen3 3.4 REQUIRED NO_MODULE)
find_package(nlohmann_json 3.11 REQUIRED)
find_package(hwy 1.0.3 REQUIRED)
find_path(HQQ_XXHASH_INCLUDE_DIR xxhash.h REQUIRED)
add_library(hqq_xxhash INTERFACE)
target_include_directories(hqq_xxhash INTERFACE ${HQQ_XXHASH_INCLUDE_DIR})
target_compile_definitions(hqq_xxhash INTERFACE XXH_INLINE_ALL)
