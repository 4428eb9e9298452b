# PCRE2 for regular expressions in names of layers: the installed library as HQQ_PCRE2_TARGET, else a
# pinned commit, whose objects become part of hqq.
set(HQQ_PCRE2_TARGET)
set(HQQ_PCRE2_OBJECTS)
set(HQQ_PCRE2_INCLUDE_DIR)
find_package(PCRE2 10.30 QUIET)
if(PCRE2_FOUND)
  set(HQQ_PCRE2_TARGET hqq::pcre2)
  return()
endif()
if(NOT HQQ_FETCH)
  message(FATAL_ERROR "PCRE2 10.30 is not installed and HQQ_FETCH is OFF. Install it (Debian package "
                      "libpcre2-dev) or name its folder in CMAKE_PREFIX_PATH.")
endif()
message(STATUS "PCRE2 is not installed (Debian package libpcre2-dev): fetching it")
enable_language(C)
# SOURCE_SUBDIR names no folder, so its CMake files are not run.
FetchContent_Declare(pcre2
  GIT_REPOSITORY https://github.com/PCRE2Project/pcre2.git
  GIT_TAG f454e231fe5006dd7ff8f4693fd2b8eb94333429  # 10.47
  GIT_SUBMODULES ""
  SOURCE_SUBDIR none)
FetchContent_MakeAvailable(pcre2)

# Its file NON-AUTOTOOLS-BUILD: two files are renamed, and these are compiled.
set(hqq_pcre2_build ${PROJECT_BINARY_DIR}/pcre2)
configure_file(${pcre2_SOURCE_DIR}/src/config.h.generic ${hqq_pcre2_build}/config.h COPYONLY)
configure_file(${pcre2_SOURCE_DIR}/src/pcre2.h.generic ${hqq_pcre2_build}/pcre2.h COPYONLY)
configure_file(${pcre2_SOURCE_DIR}/src/pcre2_chartables.c.dist
               ${hqq_pcre2_build}/pcre2_chartables.c COPYONLY)
set(hqq_pcre2_sources ${hqq_pcre2_build}/pcre2_chartables.c)
foreach(part auto_possess chkdint compile compile_cgroup compile_class config context convert
        dfa_match error extuni find_bracket jit_compile maketables match match_data match_next newline
        ord2utf pattern_info script_run serialize string_utils study substitute substring tables ucd
        valid_utf xclass)
  list(APPEND hqq_pcre2_sources ${pcre2_SOURCE_DIR}/src/pcre2_${part}.c)
endforeach()
add_library(hqq_pcre2_objects OBJECT ${hqq_pcre2_sources})
target_include_directories(hqq_pcre2_objects PRIVATE ${hqq_pcre2_build} ${pcre2_SOURCE_DIR}/src)
target_compile_definitions(hqq_pcre2_objects PRIVATE
  HAVE_CONFIG_H PCRE2_CODE_UNIT_WIDTH=8 SUPPORT_PCRE2_8 PCRE2_STATIC HAVE_MEMMOVE HAVE_STRERROR)
set_target_properties(hqq_pcre2_objects PROPERTIES C_VISIBILITY_PRESET hidden C_EXTENSIONS ON)
set(HQQ_PCRE2_OBJECTS $<TARGET_OBJECTS:hqq_pcre2_objects>)
set(HQQ_PCRE2_INCLUDE_DIR ${hqq_pcre2_build})
