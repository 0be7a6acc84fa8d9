# SPDX-License-Identifier: Apache-2.0
# latte_torch: the operators of cpp/torch for programs without Python. Headers and libtorch_cpu come
# from the torch that the interpreter imports; only torch's stable C interface (2.10) is linked, so
# that the library runs on any later torch.
find_package(Python COMPONENTS Interpreter REQUIRED)
execute_process(COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.__path__[0])"
  OUTPUT_VARIABLE torch_root OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_library(latte_torch_cpu torch_cpu PATHS ${torch_root}/lib REQUIRED NO_DEFAULT_PATH)

add_library(latte_torch MODULE cpp/torch/latte_torch.cpp)
target_include_directories(latte_torch PRIVATE cpp cpp/src)
target_include_directories(latte_torch SYSTEM PRIVATE ${torch_root}/include)
# 2.10
target_compile_definitions(latte_torch PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
if(NOT latte_cuda)
  target_sources(latte_torch PRIVATE cpp/bindings/no_cuda.cpp)
endif()
target_link_libraries(latte_torch PRIVATE latte::latte ${latte_torch_cpu})
# libtorch_cpu is found by its name among what the process has loaded.
set_target_properties(latte_torch PROPERTIES PREFIX "" OUTPUT_NAME _torch
  SKIP_BUILD_RPATH ON BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN/${CMAKE_INSTALL_LIBDIR}")
install(TARGETS latte_torch LIBRARY DESTINATION . COMPONENT python)
