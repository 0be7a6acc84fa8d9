# SPDX-License-Identifier: Apache-2.0
# cmake -DBUILD=<build folder> -DCONSUMER=<project> -DOUT=<folder> -P check_install.cmake
#
# Installs the build into a new prefix, moves it, and builds and runs a project that finds it there.
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE ${OUT})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${OUT}/first)
file(RENAME ${OUT}/first ${OUT}/moved)
file(GLOB_RECURSE config ${OUT}/moved/*/latteConfig.cmake)
cmake_path(GET config PARENT_PATH folder)
run(${CMAKE_COMMAND} -S ${CONSUMER} -B ${OUT}/build -Dlatte_DIR=${folder}
  -DCMAKE_CXX_FLAGS=${FLAGS} -DCMAKE_C_FLAGS=${FLAGS})
run(${CMAKE_COMMAND} --build ${OUT}/build)
run(${OUT}/build/consumer)
run(${OUT}/build/consumer_c)
