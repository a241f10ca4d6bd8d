// A stand-in for libcuda.so.1 over host memory, for tests: the driver functions that Baton calls, with the promises that a
// card keeps and none that it does not.
//
// Streams run late: work is queued, and done only when something waits for it, so that a missing wait reads what is not
// there yet. A captured stream refuses what a card's would, and its graph is launched as a card does: with the arguments that
// it was captured with, and what memory holds by then. Buffers end at a page nobody may touch and stay unmapped once freed, so that overruns and uses after a free
// end the process. A module image is a shared library with, for each kernel, `<name>__launch` and `<name>__n_params`.
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

using Result = int;
enum : Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    PEER_ACCESS_UNSUPPORTED = 217,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_WRONG_THREAD = 908,
};

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Settings {
    int64_t init_result = SUCCESS;
    int64_t driver_version = 13000;
    int64_t n_devices = 1;               // at most MAX_DEVICES
    int64_t peer_access = 1;             // whether one reads another's memory
    int64_t capability = 90;
    int64_t total_bytes = int64_t{8} << 30;
    int64_t green_contexts = 1;
    int64_t host_registration = 1;
    int64_t graph_bytes = 64 << 10;      // that a graph takes once it can be launched
    int64_t captured_launch_result = SUCCESS;
    int64_t end_capture_result = SUCCESS;
} settings;

// What has been asked for since the process began.
struct Counts {
    int64_t device_allocations = 0, pinned_allocations = 0, launches = 0, graph_launches = 0, copies_to_device = 0;
} counts;

[[noreturn]] void die(const char* what) {
    std::fprintf(stderr, "CUDA stand-in: %s\n", what);
    std::abort();
}

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;
bool is_initialized = false;
Result sticky = SUCCESS;
thread_local void* current_context = nullptr;
constexpr int MAX_DEVICES = 8;
int primary_contexts[MAX_DEVICES];
int n_retained[MAX_DEVICES];

// Of a primary context; a green one is of device 0.
int device_of(void* context) {
    auto* primary = static_cast<int*>(context);
    bool is_primary = primary >= primary_contexts && primary < primary_contexts + MAX_DEVICES;
    return is_primary ? static_cast<int>(primary - primary_contexts) : 0;
}

// ---- memory -------------------------------------------------------------------------------------------------------

constexpr size_t ALIGNMENT = 256;
constexpr unsigned N_MULTIPROCESSORS = 16, LEAST_SHARE = 4, SHARE_STEP = 2;
constexpr int LEAST_PRIORITY = 0, GREATEST_PRIORITY = -5;
constexpr unsigned char SLACK = 0xa5;

struct Allocation {
    size_t n_bytes;
    unsigned char* map;
    size_t map_bytes;
    // The file that it is, once it has been named to other processes.
    int fd = -1;
};
std::map<uintptr_t, Allocation> device_memory;

// What stands in a handle of memory for other processes.
struct MemoryHandle {
    char magic[8];
    int32_t pid;
    int32_t fd;
    uint64_t file;
    uint64_t n_bytes;
    uint64_t offset;
    uint64_t file_bytes;
    int32_t device;
    char rest[12];
};
static_assert(sizeof(MemoryHandle) == 64);
constexpr char MEMORY_HANDLE[8] = "standin";

// Memory that other processes own, mapped here for reading: nothing of ours writes there.
struct Foreign {
    size_t n_bytes;
    void* map;
    size_t map_bytes;
    uint64_t file;
    int n_opened;
};
std::map<uintptr_t, Foreign> foreign_memory;
std::map<uintptr_t, size_t> pinned_memory;
// The part of it that was not allocated but registered.
std::set<void*> registered_memory;
size_t allocated_bytes = 0;
// Calls of the driver that a card would be asked something by.
int64_t n_calls = 0;
// Priority and multiprocessors of the stream that was last given a kernel.
struct LastLaunch {
    int priority, n_multiprocessors;
} last_launch;

size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

void check_slack(uintptr_t base, const Allocation& allocation) {
    auto* end = reinterpret_cast<unsigned char*>(base) + round_up(allocation.n_bytes, ALIGNMENT);
    for (auto* p = reinterpret_cast<unsigned char*>(base) + allocation.n_bytes; p < end; p++)
        if (*p != SLACK) die("a kernel or copy wrote past the end of a buffer");
}

void check_all_slack() {
    for (auto& [base, allocation] : device_memory) check_slack(base, allocation);
}

template <typename Memory>
bool is_within(const Memory& memory, uintptr_t at, size_t n) {
    auto next = memory.upper_bound(at);
    if (next == memory.begin()) return false;
    auto& [base, allocation] = *std::prev(next);
    return at - base <= allocation.n_bytes && n <= allocation.n_bytes - (at - base);
}

// Whether [at, at + n) lies in one live buffer, of ours or of another process.
bool is_device(uintptr_t at, size_t n) { return is_within(device_memory, at, n) || is_within(foreign_memory, at, n); }

bool is_pinned(const void* p, size_t n) {
    auto at = reinterpret_cast<uintptr_t>(p);
    auto next = pinned_memory.upper_bound(at);
    if (next == pinned_memory.begin()) return false;
    auto& [base, n_bytes] = *std::prev(next);
    return at - base <= n_bytes && n <= n_bytes - (at - base);
}

// ---- streams, events, graphs --------------------------------------------------------------------------------------

using Op = std::function<void()>;

struct Stream;

struct Graph {
    std::vector<Op> ops;
    std::weak_ptr<Stream> launched_on;
};

enum CaptureMode { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL = 1, CAPTURE_RELAXED = 2 };

struct Capture {
    Graph graph;
    int mode;
    std::thread::id owner;
    bool is_invalid = false;
};

struct Stream {
    std::deque<Op> queue;
    bool is_alive = true;
    int priority = 0;
    // Null outside of green contexts.
    void* green = nullptr;
    unsigned n_multiprocessors = N_MULTIPROCESSORS;
    std::unique_ptr<Capture> capture;
};

struct Green {
    unsigned n_multiprocessors;
    int n_streams = 0;
};

// As in the driver's interface of CUDA 13.0.
struct Resource {
    uint32_t type;
    unsigned char padding[92];
    uint32_t n_multiprocessors;
    uint32_t least;
    uint32_t alignment;
    unsigned char rest[36];
};
static_assert(sizeof(Resource) == 144);

struct Event {
    std::shared_ptr<Stream> stream;
    uint64_t recorded = 0;
    uint64_t completed = 0;
};

std::map<void*, std::shared_ptr<Stream>> streams;
std::set<Graph*> executables;
std::map<void*, std::shared_ptr<Event>> events;

void run_one(Stream& stream) {
    if (stream.queue.empty()) die("waiting for an event that no work leads to");
    Op op = std::move(stream.queue.front());
    stream.queue.pop_front();
    op();
}

void run_all(Stream& stream) {
    while (!stream.queue.empty()) run_one(stream);
    check_all_slack();
}

void enqueue(Stream& stream, Op op) {
    if (stream.capture)
        stream.capture->graph.ops.push_back(std::move(op));
    else
        stream.queue.push_back(std::move(op));
}

// Has what synchronous copies leave under way. Streams that were made non-blocking do not wait for it.
Stream null_stream;

// Nothing but those goes to the null stream: it waits for streams in ways that production must not lean on.
std::shared_ptr<Stream> stream_of(void* handle) {
    auto found = streams.find(handle);
    return found == streams.end() ? nullptr : found->second;
}

void wait_for(const std::shared_ptr<Event>& event, uint64_t ticket) {
    while (event->completed < ticket) run_one(*event->stream);
}

void fail(Result why) {
    if (sticky == SUCCESS) sticky = why;
}

// Whether a call that may wait for streams comes while it must not: from the thread that captures, or from any while a capture
// is of the whole process. It ends the capture, and fails itself.
bool breaks_a_capture() {
    bool breaks = false;
    for (auto& [handle, stream] : streams) {
        if (!stream->capture || stream->capture->mode == CAPTURE_RELAXED) continue;
        if (stream->capture->mode == CAPTURE_THREAD_LOCAL && stream->capture->owner != std::this_thread::get_id()) continue;
        stream->capture->is_invalid = breaks = true;
    }
    return breaks;
}

// Likewise of a call on the captured stream itself.
Result break_capture(Stream& stream) {
    stream.capture->is_invalid = true;
    return STREAM_CAPTURE_UNSUPPORTED;
}

struct Module;

struct Function {
    Module* module;
    void (*launch)(unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, size_t, void**);
    unsigned n_params;
    size_t max_dynamic_shared = 48 << 10;
    std::string name;
};

std::set<Function*> functions;

struct Module {
    void* library;
    std::map<std::string, std::unique_ptr<Function>> functions;
    int n_queued = 0;
};

size_t elf_bytes(const void* image) {
    Elf64_Ehdr header;
    std::memcpy(&header, image, sizeof header);
    return header.e_shoff + size_t{header.e_shentsize} * header.e_shnum;
}

}  // namespace

#define MAY_WAIT \
    if (breaks_a_capture()) return STREAM_CAPTURE_UNSUPPORTED;

// Work for a stream that is there, and whose capture has not failed.
#define ON_STREAM(stream, handle)           \
    auto stream = stream_of(handle);        \
    if (!stream) return INVALID_HANDLE;     \
    if (stream->capture && stream->capture->is_invalid) return STREAM_CAPTURE_INVALIDATED;

#define CHECKED                                  \
    Lock lock(mutex);                            \
    if (!is_initialized) return NOT_INITIALIZED; \
    if (sticky != SUCCESS) return sticky;

// ---- for tests ----------------------------------------------------------------------------------------------------

EXPORT int stand_in_set(const char* name, int64_t value) {
    Lock lock(mutex);
    std::string key = name;
    if (key == "init_result") settings.init_result = value;
    else if (key == "driver_version") settings.driver_version = value;
    else if (key == "n_devices") settings.n_devices = value;
    else if (key == "peer_access") settings.peer_access = value;
    else if (key == "capability") settings.capability = value;
    else if (key == "total_bytes") settings.total_bytes = value;
    else if (key == "green_contexts") settings.green_contexts = value;
    else if (key == "host_registration") settings.host_registration = value;
    else if (key == "graph_bytes") settings.graph_bytes = value;
    else if (key == "captured_launch_result") settings.captured_launch_result = value;
    else if (key == "end_capture_result") settings.end_capture_result = value;
    else return 0;
    return 1;
}

EXPORT int64_t stand_in_allocated_bytes() {
    Lock lock(mutex);
    return static_cast<int64_t>(allocated_bytes);
}

EXPORT int64_t stand_in_pinned_bytes() {
    Lock lock(mutex);
    int64_t n_bytes = 0;
    for (auto& [at, n] : pinned_memory) n_bytes += static_cast<int64_t>(n);
    return n_bytes;
}

EXPORT int64_t stand_in_last_priority() {
    Lock lock(mutex);
    return last_launch.priority;
}

EXPORT int64_t stand_in_last_multiprocessors() {
    Lock lock(mutex);
    return last_launch.n_multiprocessors;
}

EXPORT int64_t stand_in_calls() {
    Lock lock(mutex);
    return n_calls;
}

EXPORT int64_t stand_in_count(const char* name) {
    Lock lock(mutex);
    std::string key = name;
    if (key == "device_allocations") return counts.device_allocations;
    if (key == "pinned_allocations") return counts.pinned_allocations;
    if (key == "launches") return counts.launches;
    if (key == "graph_launches") return counts.graph_launches;
    if (key == "copies_to_device") return counts.copies_to_device;
    return -1;
}

// For the stand-ins of other libraries.
EXPORT int stand_in_enqueue(void* handle, void (*op)(void*), void* argument) {
    Lock lock(mutex);
    ON_STREAM(stream, handle)
    if (!stream->capture) counts.launches++;
    enqueue(*stream, [op, argument] { op(argument); });
    return SUCCESS;
}

EXPORT int stand_in_is_device(uint64_t at, size_t n_bytes) {
    Lock lock(mutex);
    return is_device(at, n_bytes);
}

// ---- the driver ---------------------------------------------------------------------------------------------------

EXPORT Result cuInit(unsigned) {
    Lock lock(mutex);
    if (settings.init_result == SUCCESS && settings.n_devices == 0) return NO_DEVICE;
    if (settings.init_result == SUCCESS) is_initialized = true;
    return static_cast<Result>(settings.init_result);
}
EXPORT Result cuDriverGetVersion(int* version) {
    *version = static_cast<int>(settings.driver_version);
    return SUCCESS;
}
EXPORT Result cuGetErrorName(Result error, const char** name) {
    switch (error) {
        case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
        default: *name = "CUDA_ERROR_OF_THE_STAND_IN";
    }
    return SUCCESS;
}
EXPORT Result cuGetErrorString(Result error, const char** words) {
    switch (error) {
        case OUT_OF_MEMORY: *words = "out of memory"; break;
        case INVALID_VALUE: *words = "invalid argument"; break;
        case ILLEGAL_ADDRESS: *words = "an illegal memory access was encountered"; break;
        default: *words = "an error of the stand-in";
    }
    return SUCCESS;
}
EXPORT Result cuDeviceGetCount(int* n) {
    CHECKED
    *n = static_cast<int>(settings.n_devices);
    return SUCCESS;
}
EXPORT Result cuDeviceGet(int* device, int ordinal) {
    CHECKED
    if (ordinal < 0 || ordinal >= settings.n_devices) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}
EXPORT Result cuDeviceGetName(char* name, int n, int) {
    CHECKED
    std::snprintf(name, static_cast<size_t>(n), "CUDA stand-in");
    return SUCCESS;
}
EXPORT Result cuDeviceGetUuid_v2(char* uuid, int device) {
    std::memset(uuid, 0x5b + device, 16);
    return SUCCESS;
}
EXPORT Result cuDeviceCanAccessPeer(int* can_access, int device, int peer) {
    CHECKED
    if (std::min(device, peer) < 0 || std::max(device, peer) >= settings.n_devices) return INVALID_DEVICE;
    *can_access = device != peer && settings.peer_access;
    return SUCCESS;
}
EXPORT Result cuDeviceTotalMem_v2(size_t* n_bytes, int) {
    CHECKED
    *n_bytes = static_cast<size_t>(settings.total_bytes);
    return SUCCESS;
}
EXPORT Result cuDeviceGetAttribute(int* value, int attribute, int) {
    CHECKED
    switch (attribute) {
        case 8: *value = 48 << 10; break;                                  // shared memory of a CTA without asking
        case 10: *value = 32; break;                                       // warp size
        case 16: *value = N_MULTIPROCESSORS; break;                        // multiprocessors
        case 38: *value = 64 << 10; break;                                 // cache of the second level
        case 75: *value = static_cast<int>(settings.capability / 10); break;
        case 76: *value = static_cast<int>(settings.capability % 10); break;
        case 81: *value = 228 << 10; break;                                // shared memory of a multiprocessor
        case 97: *value = 227 << 10; break;                                // shared memory of a CTA that asks
        default: *value = 0;
    }
    return SUCCESS;
}
EXPORT Result cuDevicePrimaryCtxRetain(void** context, int device) {
    CHECKED
    if (device < 0 || device >= settings.n_devices || device >= MAX_DEVICES) return INVALID_DEVICE;
    n_retained[device]++;
    *context = &primary_contexts[device];
    return SUCCESS;
}
EXPORT Result cuDevicePrimaryCtxRelease_v2(int device) {
    Lock lock(mutex);
    if (--n_retained[device] < 0) die("a context is released more often than it was retained");
    return SUCCESS;
}
EXPORT Result cuCtxSetCurrent(void* context) {
    current_context = context;
    return SUCCESS;
}
EXPORT Result cuCtxGetCurrent(void** context) {
    *context = current_context;
    return SUCCESS;
}
EXPORT Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = LEAST_PRIORITY;
    *greatest = GREATEST_PRIORITY;
    return SUCCESS;
}

#define IN_CONTEXT \
    CHECKED        \
    n_calls++;     \
    if (!current_context) return INVALID_CONTEXT;

EXPORT Result cuCtxSynchronize() {
    IN_CONTEXT
    MAY_WAIT
    run_all(null_stream);
    for (auto& [handle, stream] : streams) run_all(*stream);
    return sticky;
}

EXPORT Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    IN_CONTEXT
    *total = static_cast<size_t>(settings.total_bytes);
    *free = *total > allocated_bytes ? *total - allocated_bytes : 0;
    return SUCCESS;
}
EXPORT Result cuMemAlloc_v2(uint64_t* out, size_t n_bytes) {
    IN_CONTEXT
    if (n_bytes == 0) return INVALID_VALUE;
    MAY_WAIT
    counts.device_allocations++;
    if (allocated_bytes + n_bytes > static_cast<size_t>(settings.total_bytes)) return OUT_OF_MEMORY;
    const size_t page = 4096, body = round_up(n_bytes, ALIGNMENT), map_bytes = round_up(body, page) + 2 * page;
    void* map = mmap(nullptr, map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return OUT_OF_MEMORY;
    auto* first = static_cast<unsigned char*>(map) + page;
    if (mprotect(first, map_bytes - 2 * page, PROT_READ | PROT_WRITE) != 0) return OUT_OF_MEMORY;
    unsigned char* base = static_cast<unsigned char*>(map) + map_bytes - page - body;
    // Whatever a card would hold: as f32, f16 or bf16 it is not a number. Large buffers are left to the system's zeros.
    if (body <= size_t{64} << 20) std::memset(base, 0xff, body);
    std::memset(base + n_bytes, SLACK, body - n_bytes);
    device_memory[reinterpret_cast<uintptr_t>(base)] = {n_bytes, static_cast<unsigned char*>(map), map_bytes, -1};
    allocated_bytes += n_bytes;
    *out = reinterpret_cast<uint64_t>(base);
    return SUCCESS;
}
EXPORT Result cuMemFree_v2(uint64_t at) {
    Lock lock(mutex);
    if (at == 0) return SUCCESS;
    MAY_WAIT
    auto found = device_memory.find(at);
    if (found == device_memory.end()) die("a device pointer is freed that was not allocated, or was freed before");
    if (found->second.fd >= 0) die("memory is freed that was named to other processes, which may have it mapped");
    // A card's driver waits here too.
    run_all(null_stream);
    for (auto& [handle, stream] : streams) run_all(*stream);
    check_slack(found->first, found->second);
    auto [n_bytes, map, map_bytes, fd] = found->second;
    // Stays mapped and forbidden, so that nothing else gets the address.
    mprotect(map, map_bytes, PROT_NONE);
    madvise(map, map_bytes, MADV_DONTNEED);
    allocated_bytes -= n_bytes;
    device_memory.erase(found);
    return SUCCESS;
}

// ---- memory between processes ---------------------------------------------------------------------------------------

// The buffer becomes a file, at the same addresses; others find it among our open files for as long as we live.
EXPORT Result cuIpcGetMemHandle(void* out, uint64_t at) {
    IN_CONTEXT
    auto found = device_memory.find(at);
    if (found == device_memory.end()) return INVALID_VALUE;
    auto& allocation = found->second;
    if (allocation.n_bytes % (size_t{2} << 20)) die("memory is named to other processes that shares a piece with other buffers");
    const size_t page = 4096, file_bytes = allocation.map_bytes - 2 * page;
    unsigned char* first = allocation.map + page;
    if (allocation.fd < 0) {
        int fd = memfd_create("baton-stand-in", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, static_cast<off_t>(file_bytes)) != 0) return OUT_OF_MEMORY;
        for (size_t done = 0; done < file_bytes;) {
            ssize_t n = pwrite(fd, first + done, file_bytes - done, static_cast<off_t>(done));
            if (n <= 0) die("a file of memory cannot be written");
            done += static_cast<size_t>(n);
        }
        if (mmap(first, file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) die("no mapping");
        allocation.fd = fd;
    }
    struct stat status;
    if (fstat(allocation.fd, &status) != 0) die("a file of memory is gone");
    MemoryHandle handle{};
    std::memcpy(handle.magic, MEMORY_HANDLE, sizeof handle.magic);
    handle.pid = getpid();
    handle.fd = allocation.fd;
    handle.file = status.st_ino;
    handle.n_bytes = allocation.n_bytes;
    handle.offset = static_cast<uint64_t>(reinterpret_cast<unsigned char*>(at) - first);
    handle.file_bytes = file_bytes;
    handle.device = device_of(current_context);
    std::memcpy(out, &handle, sizeof handle);
    return SUCCESS;
}
EXPORT Result cuIpcOpenMemHandle_v2(uint64_t* out, MemoryHandle handle, unsigned flags) {
    IN_CONTEXT
    if (flags != 1 || std::memcmp(handle.magic, MEMORY_HANDLE, sizeof handle.magic) != 0) return INVALID_VALUE;
    // A process has its own memory already.
    if (handle.pid == getpid()) return INVALID_CONTEXT;
    if (handle.device != device_of(current_context) && !settings.peer_access) return PEER_ACCESS_UNSUPPORTED;
    for (auto& [base, foreign] : foreign_memory)
        if (foreign.file == handle.file && foreign.map) {
            foreign.n_opened++;
            *out = base;
            return SUCCESS;
        }
    char path[64];
    std::snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.pid, handle.fd);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (fd < 0) return INVALID_VALUE;
    if (fstat(fd, &status) != 0 || status.st_ino != handle.file || static_cast<uint64_t>(status.st_size) != handle.file_bytes) {
        close(fd);
        return INVALID_VALUE;
    }
    const size_t page = 4096, map_bytes = handle.file_bytes + 2 * page;
    void* map = mmap(nullptr, map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return OUT_OF_MEMORY;
    auto* first = static_cast<unsigned char*>(map) + page;
    if (mmap(first, handle.file_bytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) return OUT_OF_MEMORY;
    close(fd);
    *out = reinterpret_cast<uint64_t>(first + handle.offset);
    foreign_memory[*out] = {static_cast<size_t>(handle.n_bytes), map, map_bytes, handle.file, 1};
    return SUCCESS;
}
// Waits for nothing: work that is still queued then reads what is no longer there.
EXPORT Result cuIpcCloseMemHandle(uint64_t at) {
    Lock lock(mutex);
    auto found = foreign_memory.find(at);
    if (found == foreign_memory.end()) die("memory of another process is closed that is not open");
    if (--found->second.n_opened > 0) return SUCCESS;
    mprotect(found->second.map, found->second.map_bytes, PROT_NONE);
    foreign_memory.erase(found);
    return SUCCESS;
}

EXPORT Result cuMemHostAlloc(void** out, size_t n_bytes, unsigned) {
    IN_CONTEXT
    MAY_WAIT
    counts.pinned_allocations++;
    *out = std::aligned_alloc(4096, round_up(n_bytes, 4096));
    if (!*out) return OUT_OF_MEMORY;
    std::memset(*out, 0xff, n_bytes);
    pinned_memory[reinterpret_cast<uintptr_t>(*out)] = n_bytes;
    return SUCCESS;
}
EXPORT Result cuMemFreeHost(void* p) {
    Lock lock(mutex);
    MAY_WAIT
    if (registered_memory.count(p) || pinned_memory.erase(reinterpret_cast<uintptr_t>(p)) == 0)
        die("host memory is freed that was not allocated here");
    for (auto& [handle, stream] : streams) run_all(*stream);
    std::free(p);
    return SUCCESS;
}
// Memory of the process that the driver locks where it is.
EXPORT Result cuMemHostRegister_v2(void* p, size_t n_bytes, unsigned flags) {
    IN_CONTEXT
    MAY_WAIT
    auto at = reinterpret_cast<uintptr_t>(p);
    if (n_bytes == 0 || at % 4096 || flags) return INVALID_VALUE;
    if (!settings.host_registration) return NOT_SUPPORTED;
    counts.pinned_allocations++;
    pinned_memory[at] = n_bytes;
    registered_memory.insert(p);
    return SUCCESS;
}
EXPORT Result cuMemHostUnregister(void* p) {
    Lock lock(mutex);
    MAY_WAIT
    if (registered_memory.erase(p) == 0) die("host memory is unregistered that was not registered");
    for (auto& [handle, stream] : streams) run_all(*stream);
    pinned_memory.erase(reinterpret_cast<uintptr_t>(p));
    return SUCCESS;
}

// Synchronous copies wait for no stream that was made non-blocking. From ordinary memory they return when the bytes are
// staged, which is before they are there.
EXPORT Result cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t n) {
    IN_CONTEXT
    MAY_WAIT
    if (!is_device(to, n)) return INVALID_VALUE;
    counts.copies_to_device++;
    run_all(null_stream);
    if (is_pinned(from, n)) {
        std::memcpy(reinterpret_cast<void*>(to), from, n);
        return SUCCESS;
    }
    std::vector<char> bytes(static_cast<const char*>(from), static_cast<const char*>(from) + n);
    null_stream.queue.push_back([to, n, bytes] {
        if (!is_device(to, n)) return fail(ILLEGAL_ADDRESS);
        std::memcpy(reinterpret_cast<void*>(to), bytes.data(), n);
    });
    return SUCCESS;
}
EXPORT Result cuMemcpyDtoH_v2(void* to, uint64_t from, size_t n) {
    IN_CONTEXT
    MAY_WAIT
    if (!is_device(from, n)) return INVALID_VALUE;
    run_all(null_stream);
    std::memcpy(to, reinterpret_cast<void*>(from), n);
    return SUCCESS;
}
EXPORT Result cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t n, void* handle) {
    IN_CONTEXT
    ON_STREAM(stream, handle)
    if (!is_device(to, n)) return INVALID_VALUE;
    if (!stream->capture) counts.copies_to_device++;
    if (is_pinned(from, n)) {
        enqueue(*stream, [=] {
            if (!is_device(to, n)) return fail(ILLEGAL_ADDRESS);
            if (!is_pinned(from, n)) die("host memory is freed before the copy from it");
            std::memcpy(reinterpret_cast<void*>(to), from, n);
        });
    } else {
        // Ordinary memory is staged before the call returns.
        if (stream->capture) return break_capture(*stream);
        auto bytes = std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + n);
        enqueue(*stream, [=] {
            if (!is_device(to, n)) return fail(ILLEGAL_ADDRESS);
            std::memcpy(reinterpret_cast<void*>(to), bytes->data(), n);
        });
    }
    return SUCCESS;
}
EXPORT Result cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, void* handle) {
    IN_CONTEXT
    ON_STREAM(stream, handle)
    if (!is_device(from, n)) return INVALID_VALUE;
    bool pinned = is_pinned(to, n);
    if (!pinned && stream->capture) return break_capture(*stream);
    enqueue(*stream, [=] {
        if (!is_device(from, n)) return fail(ILLEGAL_ADDRESS);
        std::memcpy(to, reinterpret_cast<void*>(from), n);
    });
    // To ordinary memory the call returns when the bytes are there.
    if (!pinned) run_all(*stream);
    return sticky;
}
EXPORT Result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void* handle) {
    IN_CONTEXT
    ON_STREAM(stream, handle)
    if (!is_device(from, n) || !is_device(to, n)) return INVALID_VALUE;
    enqueue(*stream, [=] {
        if (!is_device(from, n) || !is_device(to, n)) return fail(ILLEGAL_ADDRESS);
        std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), n);
    });
    return SUCCESS;
}
EXPORT Result cuMemsetD8Async(uint64_t to, unsigned char value, size_t n, void* handle) {
    IN_CONTEXT
    ON_STREAM(stream, handle)
    if (!is_device(to, n)) return INVALID_VALUE;
    enqueue(*stream, [=] {
        if (!is_device(to, n)) return fail(ILLEGAL_ADDRESS);
        std::memset(reinterpret_cast<void*>(to), value, n);
    });
    return SUCCESS;
}

EXPORT Result cuStreamCreateWithPriority(void** out, unsigned flags, int priority) {
    IN_CONTEXT
    if (flags != 1 || priority > LEAST_PRIORITY || priority < GREATEST_PRIORITY) return INVALID_VALUE;
    auto stream = std::make_shared<Stream>();
    stream->priority = priority;
    *out = stream.get();
    streams[*out] = stream;
    return SUCCESS;
}
EXPORT Result cuStreamCreate(void** out, unsigned flags) { return cuStreamCreateWithPriority(out, flags, 0); }
EXPORT Result cuStreamDestroy_v2(void* handle) {
    Lock lock(mutex);
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    run_all(*stream);
    if (stream->green) static_cast<Green*>(stream->green)->n_streams--;
    streams.erase(handle);
    return SUCCESS;
}

// ---- shares of the multiprocessors ----------------------------------------------------------------------------------

EXPORT Result cuDeviceGetDevResource(int, Resource* out, int type) {
    CHECKED
    if (!settings.green_contexts) return NOT_SUPPORTED;
    if (type != 1) return INVALID_VALUE;
    *out = Resource{1, {}, N_MULTIPROCESSORS, LEAST_SHARE, SHARE_STEP, {}};
    return SUCCESS;
}
EXPORT Result cuDevSmResourceSplitByCount(Resource* out, unsigned* n, const Resource* of, Resource* rest, unsigned flags,
                                          unsigned wanted) {
    CHECKED
    unsigned share = std::max(LEAST_SHARE, static_cast<unsigned>(round_up(wanted, SHARE_STEP)));
    if (of->type != 1 || *n != 1 || flags || share > of->n_multiprocessors) return INVALID_VALUE;
    *out = *of;
    out->n_multiprocessors = share;
    if (rest) {
        *rest = *of;
        rest->n_multiprocessors = of->n_multiprocessors - share;
    }
    return SUCCESS;
}
EXPORT Result cuDevResourceGenerateDesc(void** description, Resource* of, unsigned n) {
    CHECKED
    if (n != 1 || of->type != 1 || !of->n_multiprocessors) return INVALID_VALUE;
    *description = new Resource(*of);
    return SUCCESS;
}
EXPORT Result cuGreenCtxCreate(void** out, void* description, int, unsigned flags) {
    CHECKED
    if (flags != 1 || !description) return INVALID_VALUE;
    *out = new Green{static_cast<Resource*>(description)->n_multiprocessors};
    return SUCCESS;
}
EXPORT Result cuGreenCtxStreamCreate(void** out, void* handle, unsigned flags, int priority) {
    CHECKED
    Result created = cuStreamCreateWithPriority(out, flags, priority);
    if (created != SUCCESS) return created;
    auto* green = static_cast<Green*>(handle);
    green->n_streams++;
    auto stream = stream_of(*out);
    stream->green = green;
    stream->n_multiprocessors = green->n_multiprocessors;
    return SUCCESS;
}
EXPORT Result cuGreenCtxDestroy(void* handle) {
    Lock lock(mutex);
    auto* green = static_cast<Green*>(handle);
    if (green->n_streams) die("a green context is destroyed before its streams");
    delete green;
    return SUCCESS;
}

EXPORT Result cuStreamSynchronize(void* handle) {
    IN_CONTEXT
    if (!handle) {
        run_all(null_stream);
        return sticky;
    }
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return break_capture(*stream);
    MAY_WAIT
    run_all(*stream);
    return sticky;
}
EXPORT Result cuStreamQuery(void* handle) {
    IN_CONTEXT
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return break_capture(*stream);
    if (stream->queue.empty()) return SUCCESS;
    run_one(*stream);
    return NOT_READY;
}
EXPORT Result cuStreamWaitEvent(void* handle, void* event_handle, unsigned) {
    IN_CONTEXT
    auto stream = stream_of(handle);
    auto event = events.find(event_handle);
    if (!stream || event == events.end()) return INVALID_HANDLE;
    if (stream->capture) return break_capture(*stream);
    enqueue(*stream, [of = event->second, ticket = event->second->recorded] { wait_for(of, ticket); });
    return SUCCESS;
}

EXPORT Result cuEventCreate(void** out, unsigned) {
    IN_CONTEXT
    auto event = std::make_shared<Event>();
    *out = event.get();
    events[*out] = event;
    return SUCCESS;
}
EXPORT Result cuEventDestroy_v2(void* handle) {
    Lock lock(mutex);
    return events.erase(handle) ? SUCCESS : INVALID_HANDLE;
}
EXPORT Result cuEventRecord(void* handle, void* stream_handle) {
    IN_CONTEXT
    auto stream = stream_of(stream_handle);
    auto event = events.find(handle);
    if (!stream || event == events.end()) return INVALID_HANDLE;
    if (stream->capture) return break_capture(*stream);
    auto of = event->second;
    // What an event said of another stream is lost with a new record; until then it is waited for there.
    if (of->stream && of->stream != stream) wait_for(of, of->recorded);
    of->stream = stream;
    enqueue(*stream, [of, ticket = ++of->recorded] { of->completed = std::max(of->completed, ticket); });
    return SUCCESS;
}
EXPORT Result cuEventSynchronize(void* handle) {
    IN_CONTEXT
    auto event = events.find(handle);
    if (event == events.end()) return INVALID_HANDLE;
    MAY_WAIT
    auto of = event->second;
    wait_for(of, of->recorded);
    check_all_slack();
    return sticky;
}
EXPORT Result cuEventQuery(void* handle) {
    IN_CONTEXT
    auto event = events.find(handle);
    if (event == events.end()) return INVALID_HANDLE;
    MAY_WAIT
    auto of = event->second;
    if (of->completed >= of->recorded) return SUCCESS;
    run_one(*of->stream);
    return NOT_READY;
}
EXPORT Result cuEventElapsedTime_v2(float* ms, void*, void*) {
    *ms = 1.0f;
    return SUCCESS;
}
EXPORT Result cuEventElapsedTime(float* ms, void* a, void* b) { return cuEventElapsedTime_v2(ms, a, b); }

// ---- modules and launches -----------------------------------------------------------------------------------------

EXPORT Result cuModuleLoadData(void** out, const void* image) {
    IN_CONTEXT
    MAY_WAIT
    if (std::memcmp(image, ELFMAG, SELFMAG) != 0) return INVALID_IMAGE;
    Elf64_Ehdr header;
    std::memcpy(&header, image, sizeof header);
    if (header.e_machine == 190) return NO_BINARY_FOR_GPU;  // a real cubin
    // A file of its own: the loader tells libraries by their paths.
    char path[] = "/tmp/baton-stand-in-module-XXXXXX";
    int fd = mkstemp(path);
    size_t n = elf_bytes(image), done = 0;
    while (done < n) {
        ssize_t written = write(fd, static_cast<const char*>(image) + done, n - done);
        if (written <= 0) break;
        done += static_cast<size_t>(written);
    }
    close(fd);
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) std::fprintf(stderr, "CUDA stand-in: %s\n", dlerror());
    unlink(path);
    if (!library) return INVALID_IMAGE;
    *out = new Module{library, {}, 0};
    return SUCCESS;
}
EXPORT Result cuModuleUnload(void* handle) {
    Lock lock(mutex);
    auto* module = static_cast<Module*>(handle);
    if (module->n_queued != 0) die("a module is unloaded while its kernels are queued");
    for (auto& [name, function] : module->functions) ::functions.erase(function.get());
    dlclose(module->library);
    delete module;
    return SUCCESS;
}
EXPORT Result cuModuleGetFunction(void** out, void* handle, const char* name) {
    IN_CONTEXT
    auto* module = static_cast<Module*>(handle);
    auto& function = module->functions[name];
    if (!function) {
        std::string symbol = name;
        void* launch = dlsym(module->library, (symbol + "__launch").c_str());
        void* n_params = dlsym(module->library, (symbol + "__n_params").c_str());
        if (!launch || !n_params) return NOT_FOUND;
        function = std::make_unique<Function>();
        function->module = module;
        function->launch = reinterpret_cast<decltype(function->launch)>(launch);
        function->n_params = reinterpret_cast<unsigned (*)()>(n_params)();
        function->name = symbol;
        ::functions.insert(function.get());
    }
    *out = function.get();
    return SUCCESS;
}
EXPORT Result cuFuncSetAttribute(void* handle, int attribute, int value) {
    IN_CONTEXT
    if (attribute == 8) {
        if (value > 227 << 10) return INVALID_VALUE;
        static_cast<Function*>(handle)->max_dynamic_shared = static_cast<size_t>(value);
    }
    return SUCCESS;
}
EXPORT Result cuFuncGetAttribute(int* value, int, void*) {
    *value = 0;
    return SUCCESS;
}
// The parameters' number is what our host code compares; all are at most 8 bytes wide.
EXPORT Result cuFuncGetParamInfo(void* handle, size_t index, size_t* offset, size_t* n_bytes) {
    CHECKED
    if (index >= static_cast<Function*>(handle)->n_params) return INVALID_VALUE;
    *offset = 8 * index;
    *n_bytes = 8;
    return SUCCESS;
}
EXPORT Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void*, int, size_t) {
    *n = 2;
    return SUCCESS;
}
EXPORT Result cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream_handle, void** params,
                             void** extra) {
    IN_CONTEXT
    auto* function = static_cast<Function*>(handle);
    ON_STREAM(stream, stream_handle)
    uint64_t n_threads = uint64_t{block_x} * block_y * block_z;
    if (extra || !grid_x || !grid_y || !grid_z || grid_y > 65535 || grid_z > 65535 || grid_x > 0x7fffffffu || !n_threads ||
        n_threads > 1024 || block_z > 64 || shared_bytes > function->max_dynamic_shared) {
        std::fprintf(stderr, "CUDA stand-in: %s cannot be launched with grid %u %u %u, block %u %u %u, %u bytes shared\n",
                     function->name.c_str(), grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes);
        return INVALID_VALUE;
    }
    last_launch = {stream->priority, static_cast<int>(stream->n_multiprocessors)};
    if (stream->capture && settings.captured_launch_result != SUCCESS)
        return static_cast<Result>(settings.captured_launch_result);
    // Our host code gives each parameter eight bytes. They are copied now, as a driver does.
    std::vector<uint64_t> values(function->n_params);
    for (unsigned i = 0; i < function->n_params; i++) std::memcpy(&values[i], params[i], 8);
    // What is captured is not queued; it may run often or never.
    const int n_queued = stream->capture ? 0 : 1;
    if (!stream->capture) counts.launches++;
    function->module->n_queued += n_queued;
    enqueue(*stream, [=]() mutable {
        if (!::functions.count(function)) die("a graph launches a kernel whose module is unloaded");
        function->module->n_queued -= n_queued;
        std::vector<void*> arguments;
        for (auto& value : values) arguments.push_back(&value);
        function->launch(grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes, arguments.data());
    });
    return SUCCESS;
}

// ---- capture ------------------------------------------------------------------------------------------------------

EXPORT Result cuStreamBeginCapture_v2(void* handle, int mode) {
    IN_CONTEXT
    auto stream = stream_of(handle);
    if (!stream || stream->capture || mode < CAPTURE_GLOBAL || mode > CAPTURE_RELAXED) return INVALID_VALUE;
    stream->capture = std::make_unique<Capture>();
    stream->capture->mode = mode;
    stream->capture->owner = std::this_thread::get_id();
    return SUCCESS;
}
EXPORT Result cuStreamEndCapture(void* handle, void** graph) {
    IN_CONTEXT
    auto stream = stream_of(handle);
    *graph = nullptr;
    if (!stream || !stream->capture) return INVALID_VALUE;
    if (stream->capture->mode != CAPTURE_RELAXED && stream->capture->owner != std::this_thread::get_id())
        return STREAM_CAPTURE_WRONG_THREAD;
    auto capture = std::move(stream->capture);
    if (capture->is_invalid) return STREAM_CAPTURE_INVALIDATED;
    if (settings.end_capture_result != SUCCESS) return static_cast<Result>(settings.end_capture_result);
    *graph = new Graph(std::move(capture->graph));
    return SUCCESS;
}
EXPORT Result cuStreamIsCapturing(void* handle, int* status) {
    CHECKED
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->is_invalid ? 2 : 1;
    return SUCCESS;
}
EXPORT Result cuGraphInstantiateWithFlags(void** out, void* graph, uint64_t) {
    IN_CONTEXT
    MAY_WAIT
    if (allocated_bytes + static_cast<size_t>(settings.graph_bytes) > static_cast<size_t>(settings.total_bytes))
        return OUT_OF_MEMORY;
    auto* executable = new Graph(*static_cast<Graph*>(graph));
    executables.insert(executable);
    allocated_bytes += static_cast<size_t>(settings.graph_bytes);
    *out = executable;
    return SUCCESS;
}
EXPORT Result cuGraphLaunch(void* exec, void* handle) {
    IN_CONTEXT
    auto stream = stream_of(handle);
    auto* executable = static_cast<Graph*>(exec);
    if (!stream || !executables.count(executable)) return INVALID_HANDLE;
    if (stream->capture) return break_capture(*stream);
    counts.graph_launches++;
    executable->launched_on = stream;
    for (auto& op : executable->ops) enqueue(*stream, op);
    return SUCCESS;
}
EXPORT Result cuGraphUpload(void* exec, void* handle) {
    CHECKED
    return stream_of(handle) && executables.count(static_cast<Graph*>(exec)) ? SUCCESS : INVALID_HANDLE;
}
EXPORT Result cuGraphExecDestroy(void* exec) {
    Lock lock(mutex);
    auto* executable = static_cast<Graph*>(exec);
    if (!executables.erase(executable)) return INVALID_HANDLE;
    auto stream = executable->launched_on.lock();
    if (stream && !stream->queue.empty()) die("a graph is destroyed while work is queued that may be its own");
    allocated_bytes -= static_cast<size_t>(settings.graph_bytes);
    delete executable;
    return SUCCESS;
}
EXPORT Result cuGraphDestroy(void* graph) {
    Lock lock(mutex);
    delete static_cast<Graph*>(graph);
    return SUCCESS;
}
