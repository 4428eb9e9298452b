# HQQ_CUDA: the CUDA part. libhqq loads it at run time (src/cuda), so nothing links to it and a machine
# without a driver runs the same files.
#   AUTO  builds libhqq_cuda where there is an nvcc
#   ON    demands it
#   OFF   neither builds nor loads it: src/cuda/stub.cpp takes the place of library.cpp, and throws
if(NOT HQQ_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "HQQ_CUDA is \"${HQQ_CUDA}\"; it must be AUTO, ON or OFF")
endif()
# A cubin for each, and PTX for what comes later.
set(HQQ_CUDA_ARCHITECTURES "80;90" CACHE STRING "GPU architectures, from 75 on")
# The oldest: no kernel runs on a GPU before it.
set(hqq_cuda_min_compute 1000)
foreach(architecture ${HQQ_CUDA_ARCHITECTURES})
  if(NOT architecture MATCHES "^([0-9]+)a?(-real|-virtual)?$" OR CMAKE_MATCH_1 LESS 75)
    message(FATAL_ERROR "HQQ_CUDA_ARCHITECTURES has \"${architecture}\"; it must list numbers from 75 on, "
                        "as in \"80;90\"")
  endif()
  if(CMAKE_MATCH_1 LESS hqq_cuda_min_compute)
    set(hqq_cuda_min_compute ${CMAKE_MATCH_1})
  endif()
endforeach()

# Kernels and their launches are .cu, everything else is C++ of the host.
file(GLOB HQQ_CUDA_SOURCES CONFIGURE_DEPENDS
     ${PROJECT_SOURCE_DIR}/cuda/*.cu ${PROJECT_SOURCE_DIR}/cuda/*.cpp
     ${PROJECT_SOURCE_DIR}/cuda/linear/*.cu ${PROJECT_SOURCE_DIR}/cuda/linear/*.cpp)

if(NOT HQQ_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
  endif()
  set(hqq_cuda_problem "")
  if(NOT CMAKE_CUDA_COMPILER)
    set(hqq_cuda_problem "no nvcc was found")
  elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12)
    set(hqq_cuda_problem "${CMAKE_CUDA_COMPILER} has version ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
  if(hqq_cuda_problem STREQUAL "")
    # CMake 3.25 does not know that nvcc speaks C++20.
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
    endif()
    add_library(hqq_cuda SHARED ${HQQ_CUDA_SOURCES})
    target_include_directories(hqq_cuda PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/include)
    target_include_directories(hqq_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
    target_compile_features(hqq_cuda PRIVATE cxx_std_20)
    set_target_properties(hqq_cuda PROPERTIES
      CUDA_STANDARD 20 CUDA_ARCHITECTURES "${HQQ_CUDA_ARCHITECTURES}"
      CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden
      LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/cuda)
    target_compile_definitions(hqq_cuda PRIVATE HQQ_CUDA_MIN_COMPUTE=${hqq_cuda_min_compute})
    # No contraction, as in hqq_compile_options(): the same bits as on a CPU.
    target_compile_options(hqq_cuda PRIVATE
      $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false -Xcompiler=-ffp-contract=off -Xcompiler=-Wall
                                 -Xcompiler=-Wno-unknown-pragmas>
      $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off -Wall>)
    # Only hqq_cuda_api() is visible, not the runtime inside.
    target_link_options(hqq_cuda PRIVATE LINKER:--exclude-libs,ALL)
    if(HQQ_INSTALL)
      install(TARGETS hqq_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
    endif()
  elseif(HQQ_CUDA STREQUAL "ON")
    message(FATAL_ERROR "HQQ_CUDA=ON, but ${hqq_cuda_problem}: install the CUDA toolkit (12 or newer), put "
                        "its nvcc on the PATH or set CMAKE_CUDA_COMPILER, or use HQQ_CUDA=AUTO")
  else()
    message(STATUS "libhqq_cuda is not built: ${hqq_cuda_problem}")
  endif()
endif()
