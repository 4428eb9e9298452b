# PCRE2 of 8-bit characters: target hqq::pcre2. Its packages have a CMake package or not, and name the
# targets differently; the header and the library they all have.
find_path(PCRE2_INCLUDE_DIR pcre2.h)
find_library(PCRE2_LIBRARY NAMES pcre2-8 pcre2-8-static)
mark_as_advanced(PCRE2_INCLUDE_DIR PCRE2_LIBRARY)

if(PCRE2_INCLUDE_DIR)
  file(STRINGS ${PCRE2_INCLUDE_DIR}/pcre2.h PCRE2_VERSION REGEX "define PCRE2_(MAJOR|MINOR) ")
  string(REGEX REPLACE "[^0-9]*2_MAJOR +([0-9]+)[^0-9]*2_MINOR +([0-9]+).*" "\\1.\\2" PCRE2_VERSION
                       "${PCRE2_VERSION}")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(PCRE2 REQUIRED_VARS PCRE2_LIBRARY PCRE2_INCLUDE_DIR
                                        VERSION_VAR PCRE2_VERSION)
if(PCRE2_FOUND AND NOT TARGET hqq::pcre2)
  add_library(hqq::pcre2 UNKNOWN IMPORTED GLOBAL)
  set_target_properties(hqq::pcre2 PROPERTIES
    IMPORTED_LOCATION "${PCRE2_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${PCRE2_INCLUDE_DIR}")
endif()
