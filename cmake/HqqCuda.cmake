# HQQ_CUDA: the CUDA part. libhqq loads it at run time (src/cuda), so nothing links to it and a machine
# without a driver runs the same files.
#   AUTO  builds libhqq_cuda where there is an nvcc
#   ON    demands it
#   OFF   neither builds nor loads it: hqq::cuda is src/cuda_stub.cpp, whose functions throw
if(NOT HQQ_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "HQQ_CUDA is \"${HQQ_CUDA}\"; it must be AUTO, ON or OFF")
endif()
# A cubin for each, and PTX for what comes later.
set(HQQ_CUDA_ARCHITECTURES "80;90" CACHE STRING "GPU architectures, from 75 on")

file(GLOB HQQ_CUDA_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/cuda/*.cu)

if(NOT HQQ_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    # CMake 3.25 does not know that nvcc speaks C++20.
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
    endif()
    add_library(hqq_cuda SHARED ${HQQ_CUDA_SOURCES})
    target_include_directories(hqq_cuda PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/include)
    set_target_properties(hqq_cuda PROPERTIES
      CUDA_STANDARD 20 CUDA_ARCHITECTURES "${HQQ_CUDA_ARCHITECTURES}"
      CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden
      LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/cuda)
    # No contraction, as in hqq_compile_options(): the same bits as on a CPU.
    target_compile_options(hqq_cuda PRIVATE -fmad=false -Xcompiler=-ffp-contract=off
                                            -Xcompiler=-Wall -Xcompiler=-Wno-unknown-pragmas)
    # Only hqq_cuda_api() is visible, not the runtime inside.
    target_link_options(hqq_cuda PRIVATE LINKER:--exclude-libs,ALL)
    if(HQQ_INSTALL)
      install(TARGETS hqq_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
    endif()
  elseif(HQQ_CUDA STREQUAL "ON")
    message(FATAL_ERROR "HQQ_CUDA=ON, but no nvcc was found: install the CUDA toolkit (13 or newer), "
                        "put nvcc on the PATH or set CMAKE_CUDA_COMPILER, or use HQQ_CUDA=AUTO")
  else()
    message(STATUS "No nvcc: libhqq_cuda is not built")
  endif()
endif()
