// The module yoco_ext._C: what this build is. Nothing at run time depends on it.
#include <pybind11/pybind11.h>

#include <string>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of yoco_ext";
  m.attr("version") = YOCO_VERSION;
  m.attr("git_revision") = YOCO_GIT_REVISION;
  m.attr("cxx_compiler") = YOCO_CXX_COMPILER;
  m.attr("cuda_compiler") = YOCO_CUDA_COMPILER;
  m.attr("cpu_isas") = YOCO_CPU_ISAS;
  m.attr("cuda_archs") = YOCO_CUDA_ARCHS;
}
