# The CMake package hqq: find_package(hqq CONFIG REQUIRED), then hqq::hqq (tests/install uses it).
if(NOT HQQ_INSTALL)
  return()
endif()
include(CMakePackageConfigHelpers)

# A static hqq names what it links privately, so hqq_xxhash is exported too; it is empty by then.
install(TARGETS hqq hqq_core hqq_xxhash EXPORT hqqTargets
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/hqq DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.hpp")

set(hqq_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/hqq)
install(EXPORT hqqTargets NAMESPACE hqq:: DESTINATION ${hqq_package_dir})
get_target_property(hqq_type hqq TYPE)
configure_package_config_file(cmake/hqqConfig.cmake.in ${PROJECT_BINARY_DIR}/hqqConfig.cmake
  INSTALL_DESTINATION ${hqq_package_dir})
# Before 1.0 a minor release may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/hqqConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/hqqConfig.cmake ${PROJECT_BINARY_DIR}/hqqConfigVersion.cmake
  cmake/FindPCRE2.cmake DESTINATION ${hqq_package_dir})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
