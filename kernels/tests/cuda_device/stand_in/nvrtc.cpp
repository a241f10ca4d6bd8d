// A stand-in for libnvrtc.so.13, for tests: what it compiles is a shared library for the host, by g++ and the shim, which
// the stand-in of the driver takes as a module image.
#include <dirent.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

extern char** environ;

namespace {

struct Program {
    std::string source;
    std::map<std::string, std::string> headers;
    std::string image;
    std::string log;
};

std::atomic<int> n_compiled{0};

std::string read_file(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
}

void write_file(const std::string& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
}

}  // namespace

EXPORT int stand_in_n_compiled() { return n_compiled; }

EXPORT const char* nvrtcGetErrorString(int) { return "an error of the stand-in"; }
EXPORT int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return 0;
}
EXPORT int nvrtcCreateProgram(Program** out, const char* source, const char*, int n_headers, const char* const* headers,
                              const char* const* names) {
    *out = new Program{source, {}, {}, {}};
    for (int i = 0; i < n_headers; i++) (*out)->headers[names[i]] = headers[i];
    return 0;
}
EXPORT int nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return 0;
}
EXPORT int nvrtcCompileProgram(Program* program, int n_options, const char* const* options) {
    bool has_architecture = false;
    for (int i = 0; i < n_options; i++) has_architecture |= std::strncmp(options[i], "--gpu-architecture=sm_", 22) == 0;
    for (int i = 0; i < n_options; i++) {
        // Another compiler than the one that kernels are checked with may spill.
        if (std::strstr(options[i], "-warn-spills")) program->log = "ptxas warning : Registers are spilled to local memory\n";
        if (std::strstr(options[i], "-Werror")) return 6;  // NVRTC_ERROR_COMPILATION
    }
    if (!has_architecture) return 5;  // NVRTC_ERROR_INVALID_OPTION: nothing but cubins is asked for
    char folder[] = "/tmp/baton-stand-in-XXXXXX";
    if (!mkdtemp(folder)) return 1;
    std::string at = folder;
    write_file(at + "/kernel.cpp", program->source);
    for (auto& [name, text] : program->headers) write_file(at + "/" + name, text);
    std::vector<std::string> words = {"g++", "-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-w", "-DBATON_SHIM", "-I" + at,
                                      "-I" STAND_IN_SHIM_DIR, at + "/kernel.cpp", "-o", at + "/kernel.so", "-lpthread"};
    std::vector<char*> arguments;
    for (auto& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    std::string log = at + "/log";
    posix_spawn_file_actions_addopen(&actions, 2, log.c_str(), O_WRONLY | O_CREAT, 0600);
    pid_t child;
    int status = -1;
    if (posix_spawnp(&child, "g++", &actions, nullptr, arguments.data(), environ) == 0) waitpid(child, &status, 0);
    posix_spawn_file_actions_destroy(&actions);
    program->log += read_file(log);
    program->image = read_file(at + "/kernel.so");
    if (DIR* entries = opendir(folder)) {
        while (dirent* entry = readdir(entries)) unlink((at + "/" + entry->d_name).c_str());
        closedir(entries);
    }
    rmdir(folder);
    n_compiled++;
    return status == 0 ? 0 : 6;  // NVRTC_ERROR_COMPILATION
}
EXPORT int nvrtcGetCUBINSize(Program* program, size_t* n) {
    *n = program->image.size();
    return 0;
}
EXPORT int nvrtcGetCUBIN(Program* program, char* out) {
    std::memcpy(out, program->image.data(), program->image.size());
    return 0;
}
EXPORT int nvrtcGetProgramLogSize(Program* program, size_t* n) {
    *n = program->log.size() + 1;
    return 0;
}
EXPORT int nvrtcGetProgramLog(Program* program, char* out) {
    std::memcpy(out, program->log.c_str(), program->log.size() + 1);
    return 0;
}
