/*
 * A stand-in for NVIDIA's management library.
 *
 * What it knows comes from one text file, named by EBB_LAB_NVML_STATE and read anew at each call; the file's
 * format and its writers are in hack/lab/src/nvml_state.rs. Return codes, structure layouts and the semantics of
 * the size arguments are those of the real library (driver branch 570), because its callers depend on them:
 *
 *  - memory: version 1 counts what the driver keeps for itself as used, version 2 tells it apart;
 *  - process lists: too small a buffer gives INSUFFICIENT_SIZE and the count that is needed;
 *  - a GPU that fell off the bus is still counted, and every question about it answers GPU_IS_LOST;
 *  - what such a GPU cannot do is NOT_SUPPORTED, not absent;
 *  - a MIG instance is a device with a handle of its own and is not counted; places of instances have gaps.
 *
 * Writers replace the file by rename, so one read sees one state. A file that makes no sense gives UNKNOWN.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))

typedef unsigned int nvmlReturn_t;
enum {
    OK = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    TIMEOUT = 10,
    GPU_IS_LOST = 15,
    MEMORY = 20,
    ARGUMENT_VERSION_MISMATCH = 25,
    UNKNOWN = 999,
};

/* Bounds. A node has at most 16 GPUs today; a file past these is taken as damaged. */
#define MAX_DEVICES 192 /* cards and MIG instances together */
#define MAX_CARDS 64
#define MIG_PLACES 7
#define MAX_FILE (1 << 20)
#define EVENT_XID 8ULL
#define VALUE_NOT_AVAILABLE UINT64_MAX
#define NO_INSTANCE 0xFFFFFFFFu

typedef enum { HEALTHY, LOST, XID } health_t;

typedef struct {
    unsigned index;
    char uuid[80];
    char name[96];
    uint64_t total, reserved, used;
    health_t health;
    unsigned xid;
    unsigned gpu_utilization, memory_utilization;
    bool mig;       /* a card that is cut up */
    int card;       /* of an instance: its card's place in snapshot.devices; -1 of a card */
    unsigned place; /* of an instance: which of its card's */
} device_t;

typedef struct {
    unsigned device; /* place in snapshot.devices */
    unsigned pid;
    uint64_t used;
} process_t;

typedef struct {
    char driver[80];
    unsigned device_count, card_count, process_count, process_room;
    device_t devices[MAX_DEVICES]; /* the cards by index, then the instances */
    process_t *processes;
} snapshot_t;

/* ---- handles ------------------------------------------------------------------------------------------------- */

/* A device handle is a slot in this table, so that a made-up pointer is told from a handle without touching it.
   Slots are never given back: a handle stays good for as long as the library is loaded, as with the real one. */
typedef struct {
    char uuid[80];
} handle_t;
typedef handle_t *nvmlDevice_t;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned users; /* nvmlInit counts, nvmlShutdown counts down */
static handle_t handles[1024];
static unsigned handle_count;

static bool initialized(void) {
    pthread_mutex_lock(&lock);
    bool yes = users > 0;
    pthread_mutex_unlock(&lock);
    return yes;
}

static nvmlDevice_t handle_of(const char *uuid) {
    nvmlDevice_t found = NULL;
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < handle_count && !found; i++)
        if (strcmp(handles[i].uuid, uuid) == 0) found = &handles[i];
    if (!found && handle_count < sizeof handles / sizeof *handles) {
        found = &handles[handle_count++];
        snprintf(found->uuid, sizeof found->uuid, "%s", uuid);
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static bool handle_ok(nvmlDevice_t device) {
    uintptr_t at = (uintptr_t)device, first = (uintptr_t)handles;
    pthread_mutex_lock(&lock);
    bool yes = at >= first && at < first + handle_count * sizeof *handles && (at - first) % sizeof *handles == 0;
    pthread_mutex_unlock(&lock);
    return yes;
}

/* ---- the state file ------------------------------------------------------------------------------------------ */

static nvmlReturn_t read_file(char **text) {
    const char *path = getenv("EBB_LAB_NVML_STATE");
    if (!path || !*path) return DRIVER_NOT_LOADED;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno == EACCES ? NO_PERMISSION : DRIVER_NOT_LOADED;
    struct stat st;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size > MAX_FILE) {
        close(fd);
        return UNKNOWN;
    }
    size_t size = (size_t)st.st_size, have = 0;
    char *buffer = malloc(size + 1);
    if (!buffer) {
        close(fd);
        return MEMORY;
    }
    while (have < size) {
        ssize_t n = read(fd, buffer + have, size - have);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break;
        have += (size_t)n;
    }
    close(fd);
    buffer[have] = 0;
    if (have != size || memchr(buffer, 0, have)) { /* cut short, or binary */
        free(buffer);
        return UNKNOWN;
    }
    *text = buffer;
    return OK;
}

/* The next word of a line, or NULL. */
static char *word(char **rest) {
    char *w;
    do w = strsep(rest, " ");
    while (w && !*w);
    return w;
}

static bool number(const char *w, uint64_t most, uint64_t *value) {
    if (!w || *w < '0' || *w > '9') return false;
    char *end;
    errno = 0;
    unsigned long long v = strtoull(w, &end, 10);
    if (errno || *end || v > most) return false;
    *value = v;
    return true;
}

static int device_named(const snapshot_t *s, const char *uuid) {
    for (unsigned i = 0; i < s->device_count; i++)
        if (strcmp(s->devices[i].uuid, uuid) == 0) return (int)i;
    return -1;
}

static bool read_device(snapshot_t *s, char *rest) {
    uint64_t index, total, reserved, xid = 48; /* double bit ECC error, when the file names none */
    char *w = word(&rest), *uuid = word(&rest);
    if (s->device_count == MAX_CARDS || !number(w, MAX_CARDS, &index) || !uuid) return false;
    if (strlen(uuid) >= sizeof s->devices->uuid || device_named(s, uuid) >= 0) return false;
    if (!number(word(&rest), INT64_MAX, &total) || !number(word(&rest), total, &reserved)) return false;
    char *health = word(&rest);
    if (!health || !rest || !*rest) return false;
    device_t *d = &s->devices[s->device_count];
    memset(d, 0, sizeof *d);
    if (strcmp(health, "healthy") == 0) d->health = HEALTHY;
    else if (strcmp(health, "lost") == 0) d->health = LOST;
    else if (strncmp(health, "xid", 3) == 0) {
        d->health = XID;
        if (health[3] && (health[3] != '=' || !number(health + 4, 999, &xid))) return false;
    } else return false;
    d->card = -1;
    d->index = (unsigned)index;
    d->xid = (unsigned)xid;
    d->total = total;
    d->reserved = reserved;
    snprintf(d->uuid, sizeof d->uuid, "%s", uuid);
    snprintf(d->name, sizeof d->name, "%s", rest);
    s->device_count++;
    return true;
}

/* mig UUID: the card is cut up. */
static bool read_mig(snapshot_t *s, char *rest) {
    char *uuid = word(&rest);
    int card = uuid ? device_named(s, uuid) : -1;
    if (card < 0 || s->devices[card].card >= 0) return false;
    s->devices[card].mig = true;
    return true;
}

/* instance CARD PLACE UUID TOTAL PROFILE: a part of a card that is cut up. */
static bool read_instance(snapshot_t *s, char *rest) {
    char *of = word(&rest);
    uint64_t place, total;
    int card = of ? device_named(s, of) : -1;
    if (card < 0 || !s->devices[card].mig || s->device_count == MAX_DEVICES) return false;
    if (!number(word(&rest), MIG_PLACES - 1, &place)) return false;
    char *uuid = word(&rest);
    if (!uuid || strlen(uuid) >= sizeof s->devices->uuid || device_named(s, uuid) >= 0) return false;
    if (!number(word(&rest), s->devices[card].total, &total)) return false;
    char *profile = word(&rest);
    if (!profile) return false;
    device_t *d = &s->devices[s->device_count];
    memset(d, 0, sizeof *d);
    d->card = card;
    d->index = s->devices[card].index;
    d->place = (unsigned)place;
    d->total = total;
    snprintf(d->uuid, sizeof d->uuid, "%s", uuid);
    snprintf(d->name, sizeof d->name, "%.60s MIG %.24s", s->devices[card].name, profile);
    s->device_count++;
    return true;
}

/* process UUID PID BYTES, or process UUID PID -1 [BYTES]: the driver counts the bytes but cannot say whose. */
static bool read_process(snapshot_t *s, char *rest) {
    char *uuid = word(&rest), *pid_word = word(&rest), *used_word = word(&rest), *counted_word = word(&rest);
    uint64_t pid, used, counted = 0;
    if (!uuid || !number(pid_word, UINT32_MAX, &pid) || !used_word) return false;
    int device = device_named(s, uuid);
    if (device < 0) return false;
    if (strcmp(used_word, "-1") == 0) {
        used = VALUE_NOT_AVAILABLE;
        if (counted_word && !number(counted_word, INT64_MAX, &counted)) return false;
    } else {
        if (!number(used_word, INT64_MAX, &used)) return false;
        counted = used;
    }
    if (s->process_count == s->process_room) {
        unsigned room = s->process_room ? 2 * s->process_room : 32;
        process_t *more = realloc(s->processes, room * sizeof *more);
        if (!more) return false;
        s->processes = more;
        s->process_room = room;
    }
    s->processes[s->process_count++] = (process_t){(unsigned)device, (unsigned)pid, used};
    device_t *d = &s->devices[device];
    uint64_t room = d->total - d->reserved - d->used;
    d->used += counted < room ? counted : room; /* a GPU never says that it uses more than it has */
    if (d->card >= 0) {
        d = &s->devices[d->card];
        room = d->total - d->reserved - d->used;
        d->used += counted < room ? counted : room;
    }
    return true;
}

static bool read_utilization(snapshot_t *s, char *rest) {
    char *uuid = word(&rest);
    uint64_t gpu, memory;
    int device = uuid ? device_named(s, uuid) : -1;
    if (device < 0 || !number(word(&rest), 100, &gpu) || !number(word(&rest), 100, &memory)) return false;
    s->devices[device].gpu_utilization = (unsigned)gpu;
    s->devices[device].memory_utilization = (unsigned)memory;
    return true;
}

static int by_index(const void *a, const void *b) {
    unsigned x = ((const device_t *)a)->index, y = ((const device_t *)b)->index;
    return (x > y) - (x < y);
}

static bool parse(snapshot_t *s, char *text, nvmlReturn_t *state) {
    char *rest = text, *line = strsep(&rest, "\n");
    *state = DRIVER_NOT_LOADED;
    if (strcmp(line, "nodriver") == 0) return true;
    *state = OK;
    char *kind = word(&line), *version = word(&line);
    if (!kind || strcmp(kind, "driver") != 0 || !version || strlen(version) >= sizeof s->driver) return false;
    snprintf(s->driver, sizeof s->driver, "%s", version);
    bool ordered = false; /* devices come first, and are put in order before the other lines refer to them */
    while ((line = strsep(&rest, "\n"))) {
        if (!*line) continue;
        bool is_device = strncmp(line, "device ", 7) == 0;
        if (!is_device && !ordered) {
            qsort(s->devices, s->device_count, sizeof *s->devices, by_index);
            s->card_count = s->device_count;
            ordered = true;
        }
        char *at = line, *what = word(&at);
        if (!at) return false;
        bool good = false;
        if (is_device) good = !ordered && read_device(s, at);
        else if (strcmp(what, "mig") == 0) good = read_mig(s, at);
        else if (strcmp(what, "instance") == 0) good = read_instance(s, at);
        else if (strcmp(what, "process") == 0) good = read_process(s, at);
        else if (strcmp(what, "utilization") == 0) good = read_utilization(s, at);
        if (!good) return false;
    }
    if (!ordered) {
        qsort(s->devices, s->device_count, sizeof *s->devices, by_index);
        s->card_count = s->device_count;
    }
    for (unsigned i = 0; i < s->card_count; i++) /* NVML numbers without gaps */
        if (s->devices[i].index != i) return false;
    return true;
}

static void drop(snapshot_t *s) {
    if (!s) return;
    free(s->processes);
    free(s);
}

static nvmlReturn_t load(snapshot_t **snapshot) {
    char *text;
    nvmlReturn_t code = read_file(&text);
    if (code != OK) return code;
    snapshot_t *s = calloc(1, sizeof *s);
    if (!s) {
        free(text);
        return MEMORY;
    }
    if (!parse(s, text, &code)) code = UNKNOWN;
    free(text);
    if (code != OK) {
        drop(s);
        return code;
    }
    *snapshot = s;
    return OK;
}

/* What every question about a device begins with. On OK the caller drops the snapshot. */
static nvmlReturn_t ask(nvmlDevice_t device, snapshot_t **snapshot, device_t **d) {
    if (!initialized()) return UNINITIALIZED;
    if (!handle_ok(device)) return INVALID_ARGUMENT;
    nvmlReturn_t code = load(snapshot);
    if (code != OK) return code;
    int at = device_named(*snapshot, device->uuid);
    int card = at >= 0 && (*snapshot)->devices[at].card >= 0 ? (*snapshot)->devices[at].card : at;
    code = at < 0 || (*snapshot)->devices[card].health == LOST ? GPU_IS_LOST : OK;
    if (code == OK) *d = &(*snapshot)->devices[at];
    else drop(*snapshot);
    return code;
}

static nvmlReturn_t give_text(const char *text, char *buffer, unsigned length) {
    if (!buffer) return INVALID_ARGUMENT;
    if (strlen(text) >= length) return INSUFFICIENT_SIZE;
    strcpy(buffer, text);
    return OK;
}

/* ---- library and system -------------------------------------------------------------------------------------- */

API nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    (void)flags; /* NO_GPUS and NO_ATTACH change nothing here: nothing is attached */
    snapshot_t *s;
    nvmlReturn_t code = load(&s);
    if (code != OK) return code;
    drop(s);
    pthread_mutex_lock(&lock);
    users++;
    pthread_mutex_unlock(&lock);
    return OK;
}
API nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
API nvmlReturn_t nvmlInit(void) { return nvmlInitWithFlags(0); }

API nvmlReturn_t nvmlShutdown(void) {
    pthread_mutex_lock(&lock);
    nvmlReturn_t code = users ? OK : UNINITIALIZED;
    if (users) users--;
    pthread_mutex_unlock(&lock);
    return code;
}

API const char *nvmlErrorString(nvmlReturn_t code) {
    switch (code) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case GPU_IS_LOST: return "GPU is lost";
    case MEMORY: return "Insufficient Memory";
    case ARGUMENT_VERSION_MISMATCH: return "Argument Version Mismatch";
    default: return "Unknown Error";
    }
}

static nvmlReturn_t driver(char version[80]) {
    if (!initialized()) return UNINITIALIZED;
    snapshot_t *s;
    nvmlReturn_t code = load(&s);
    if (code != OK) return code;
    memcpy(version, s->driver, sizeof s->driver);
    drop(s);
    return OK;
}

API nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length) {
    char text[80];
    nvmlReturn_t code = driver(text);
    return code == OK ? give_text(text, version, length) : code;
}

/* The CUDA version that came with a driver branch. */
static int cuda_of(const char *driver_version) {
    int branch = atoi(driver_version);
    return branch >= 590   ? 13010
           : branch >= 580 ? 13000
           : branch >= 570 ? 12080
           : branch >= 560 ? 12060
           : branch >= 550 ? 12040
           : branch >= 535 ? 12020
                           : 12000;
}

API nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned length) {
    char text[80], full[100];
    nvmlReturn_t code = driver(text);
    if (code != OK) return code;
    snprintf(full, sizeof full, "%d.%s", cuda_of(text) / 1000, text);
    return give_text(full, version, length);
}

API nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) {
    char text[80];
    if (!version) return INVALID_ARGUMENT;
    nvmlReturn_t code = driver(text);
    if (code == OK) *version = cuda_of(text);
    return code;
}
API nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

API nvmlReturn_t nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length) {
    if (!initialized()) return UNINITIALIZED;
    if (!name || !length) return INVALID_ARGUMENT;
    char path[64], line[4096];
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return NOT_FOUND;
    ssize_t n = read(fd, line, sizeof line - 1);
    close(fd);
    if (n <= 0) return NOT_FOUND;
    line[n] = 0;
    snprintf(name, length, "%s", line); /* the first argument, cropped as the real one crops */
    return OK;
}

/* ---- finding devices ----------------------------------------------------------------------------------------- */

API nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    if (!initialized()) return UNINITIALIZED;
    if (!count) return INVALID_ARGUMENT;
    snapshot_t *s;
    nvmlReturn_t code = load(&s);
    if (code != OK) return code;
    *count = s->card_count; /* a lost GPU is counted */
    drop(s);
    return OK;
}
API nvmlReturn_t nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

static nvmlReturn_t give_handle(const device_t *d, nvmlDevice_t *device) {
    if (d->health == LOST) return GPU_IS_LOST;
    *device = handle_of(d->uuid);
    return *device ? OK : MEMORY;
}

API nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    if (!initialized()) return UNINITIALIZED;
    if (!device) return INVALID_ARGUMENT;
    snapshot_t *s;
    nvmlReturn_t code = load(&s);
    if (code != OK) return code;
    code = index < s->card_count ? give_handle(&s->devices[index], device) : INVALID_ARGUMENT;
    drop(s);
    return code;
}
API nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned index, nvmlDevice_t *device) {
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

API nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    if (!initialized()) return UNINITIALIZED;
    if (!uuid || !device) return INVALID_ARGUMENT;
    snapshot_t *s;
    nvmlReturn_t code = load(&s);
    if (code != OK) return code;
    int at = device_named(s, uuid);
    code = at < 0 ? NOT_FOUND : give_handle(&s->devices[at], device);
    drop(s);
    return code;
}

static void bus_id(unsigned index, char *text, size_t size, int domain_digits) {
    snprintf(text, size, "%0*X:%02X:00.0", domain_digits, 0u, 0x10 + index);
}

API nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *id, nvmlDevice_t *device) {
    if (!initialized()) return UNINITIALIZED;
    if (!id || !device) return INVALID_ARGUMENT;
    snapshot_t *s;
    nvmlReturn_t code = load(&s);
    if (code != OK) return code;
    code = NOT_FOUND;
    for (unsigned i = 0; i < s->card_count && code == NOT_FOUND; i++) {
        char full[32], legacy[32], bare[32];
        bus_id(s->devices[i].index, full, sizeof full, 8);
        bus_id(s->devices[i].index, legacy, sizeof legacy, 4);
        snprintf(bare, sizeof bare, "%s", legacy + 5);
        if (!strcasecmp(id, full) || !strcasecmp(id, legacy) || !strcasecmp(id, bare))
            code = give_handle(&s->devices[i], device);
    }
    drop(s);
    return code;
}
API nvmlReturn_t nvmlDeviceGetHandleByPciBusId(const char *id, nvmlDevice_t *device) {
    return nvmlDeviceGetHandleByPciBusId_v2(id, device);
}

/* ---- about one device ---------------------------------------------------------------------------------------- */

/* Runs the rest with `d` and `s` set when the device answers; `code` is what is returned. */
#define WITH_DEVICE(device, ...)                                                                                       \
    snapshot_t *s = NULL;                                                                                              \
    device_t *d = NULL;                                                                                                \
    nvmlReturn_t code = ask(device, &s, &d);                                                                           \
    if (code != OK) return code;                                                                                       \
    __VA_ARGS__;                                                                                                       \
    drop(s);                                                                                                           \
    return code

API nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length) {
    WITH_DEVICE(device, code = give_text(d->uuid, uuid, length));
}

API nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length) {
    WITH_DEVICE(device, code = give_text(d->name, name, length));
}

static nvmlReturn_t give_number(unsigned value, unsigned *to) {
    if (!to) return INVALID_ARGUMENT;
    *to = value;
    return OK;
}

API nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index) {
    WITH_DEVICE(device, code = give_number(d->index, index));
}

API nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned *minor) {
    WITH_DEVICE(device, code = give_number(d->index, minor));
}

API nvmlReturn_t nvmlDeviceGetPersistenceMode(nvmlDevice_t device, unsigned *mode) {
    WITH_DEVICE(device, code = give_number(1, mode));
}

API nvmlReturn_t nvmlDeviceGetComputeMode(nvmlDevice_t device, unsigned *mode) {
    WITH_DEVICE(device, code = give_number(0, mode)); /* default: any number of processes */
}

API nvmlReturn_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t device, unsigned *is_mig) {
    WITH_DEVICE(device, code = give_number(d->card >= 0, is_mig));
}

API nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned *count) {
    WITH_DEVICE(device, code = give_number(d->mig ? MIG_PLACES : 0, count));
}

API nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending) {
    WITH_DEVICE(device, {
        code = d->mig ? give_number(1, current) : NOT_SUPPORTED;
        if (code == OK) code = give_number(1, pending);
    });
}

API nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned index, nvmlDevice_t *mig) {
    if (!mig) return initialized() ? INVALID_ARGUMENT : UNINITIALIZED;
    WITH_DEVICE(device, {
        code = !d->mig ? NOT_SUPPORTED : index >= MIG_PLACES ? INVALID_ARGUMENT : NOT_FOUND;
        for (unsigned i = s->card_count; i < s->device_count && code == NOT_FOUND; i++)
            if (&s->devices[s->devices[i].card] == d && s->devices[i].place == index)
                code = give_handle(&s->devices[i], mig);
    });
}

API nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t mig, nvmlDevice_t *device) {
    if (!device) return initialized() ? INVALID_ARGUMENT : UNINITIALIZED;
    WITH_DEVICE(mig, code = d->card >= 0 ? give_handle(&s->devices[d->card], device) : INVALID_ARGUMENT);
}

typedef struct {
    unsigned long long total, free, used;
} memory_v1_t;
typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} memory_v2_t;

API nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, memory_v1_t *memory) {
    if (!memory) return initialized() ? INVALID_ARGUMENT : UNINITIALIZED;
    WITH_DEVICE(device, {
        memory->total = d->total;
        memory->free = d->total - d->reserved - d->used;
        memory->used = d->reserved + d->used;
    });
}

API nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, memory_v2_t *memory) {
    if (!memory) return initialized() ? INVALID_ARGUMENT : UNINITIALIZED;
    if (memory->version != (sizeof *memory | 2u << 24)) return ARGUMENT_VERSION_MISMATCH;
    WITH_DEVICE(device, {
        memory->total = d->total;
        memory->reserved = d->reserved;
        memory->free = d->total - d->reserved - d->used;
        memory->used = d->used;
    });
}

typedef struct {
    unsigned gpu, memory;
} utilization_t;

API nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, utilization_t *rates) {
    if (!rates) return initialized() ? INVALID_ARGUMENT : UNINITIALIZED;
    WITH_DEVICE(device, {
        if (d->mig || d->card >= 0) code = NOT_SUPPORTED;
        rates->gpu = d->gpu_utilization;
        rates->memory = d->memory_utilization;
    });
}

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} pci_t;

API nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, pci_t *pci) {
    if (!pci) return initialized() ? INVALID_ARGUMENT : UNINITIALIZED;
    WITH_DEVICE(device, {
        memset(pci, 0, sizeof *pci);
        pci->bus = 0x10 + d->index;
        pci->pci_device_id = 0x233010DE; /* vendor NVIDIA */
        pci->pci_subsystem_id = 0x16C110DE;
        bus_id(d->index, pci->bus_id_legacy, sizeof pci->bus_id_legacy, 4);
        bus_id(d->index, pci->bus_id, sizeof pci->bus_id, 8);
    });
}
API nvmlReturn_t nvmlDeviceGetPciInfo_v2(nvmlDevice_t device, pci_t *pci) { return nvmlDeviceGetPciInfo_v3(device, pci); }

/* Version 1 has pid and bytes; version 2 (also what _v3 takes) adds the MIG instances. */
typedef struct {
    unsigned pid;
    unsigned long long used;
} process_v1_t;
typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} process_v2_t;

static nvmlReturn_t processes(nvmlDevice_t device, unsigned *count, void *list, bool with_instances) {
    if (!count) return initialized() ? INVALID_ARGUMENT : UNINITIALIZED;
    WITH_DEVICE(device, {
        unsigned room = list ? *count : 0;
        unsigned needed = 0;
        bool given = *count > 0;
        for (unsigned i = 0; i < s->process_count; i++) {
            const process_t *p = &s->processes[i];
            device_t *on = &s->devices[p->device];
            bool in_part = on->card >= 0; /* a card lists the processes of all its instances */
            if (on != d && !(in_part && &s->devices[on->card] == d)) continue;
            unsigned instance = in_part ? on->place + 1 : NO_INSTANCE, compute = in_part ? 0 : NO_INSTANCE;
            if (needed < room && with_instances)
                ((process_v2_t *)list)[needed] = (process_v2_t){p->pid, p->used, instance, compute};
            else if (needed < room) ((process_v1_t *)list)[needed] = (process_v1_t){p->pid, p->used};
            needed++;
        }
        if (given && !list) code = INVALID_ARGUMENT;
        else {
            code = needed > room ? INSUFFICIENT_SIZE : OK;
            *count = needed;
        }
    });
}

API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, void *list) {
    return processes(device, count, list, true);
}
API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned *count, void *list) {
    return processes(device, count, list, true);
}
API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t device, unsigned *count, void *list) {
    return processes(device, count, list, false);
}

/* Nothing here draws. */
static nvmlReturn_t no_processes(nvmlDevice_t device, unsigned *count) {
    WITH_DEVICE(device, code = give_number(0, count));
}
#define NO_PROCESSES(name)                                                                                             \
    API nvmlReturn_t name(nvmlDevice_t device, unsigned *count, void *list) {                                          \
        (void)list;                                                                                                    \
        return no_processes(device, count);                                                                            \
    }
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3)

/* ---- events -------------------------------------------------------------------------------------------------- */

/* Critical XID errors: one event when a device's line turns to `xid` or `lost`. */
#define MAX_WATCHED 64
#define SETS 32
typedef struct {
    bool open;
    unsigned watched;
    nvmlDevice_t devices[MAX_WATCHED];
    bool told[MAX_WATCHED];
} event_set_t;
static event_set_t sets[SETS];

static event_set_t *set_ok(event_set_t *set) { /* under the lock */
    uintptr_t at = (uintptr_t)set, first = (uintptr_t)sets;
    bool yes = at >= first && at < first + sizeof sets && (at - first) % sizeof *sets == 0;
    return yes && set->open ? set : NULL;
}

API nvmlReturn_t nvmlEventSetCreate(event_set_t **set) {
    if (!initialized()) return UNINITIALIZED;
    if (!set) return INVALID_ARGUMENT;
    nvmlReturn_t code = MEMORY;
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < SETS && code != OK; i++)
        if (!sets[i].open) {
            memset(&sets[i], 0, sizeof sets[i]);
            sets[i].open = true;
            *set = &sets[i];
            code = OK;
        }
    pthread_mutex_unlock(&lock);
    return code;
}

API nvmlReturn_t nvmlEventSetFree(event_set_t *set) {
    if (!initialized()) return UNINITIALIZED;
    pthread_mutex_lock(&lock);
    nvmlReturn_t code = set_ok(set) ? OK : INVALID_ARGUMENT;
    if (code == OK) set->open = false;
    pthread_mutex_unlock(&lock);
    return code;
}

API nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, unsigned long long *types) {
    if (!types) return initialized() ? INVALID_ARGUMENT : UNINITIALIZED;
    WITH_DEVICE(device, *types = EVENT_XID);
}

API nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, event_set_t *set) {
    if (types & ~EVENT_XID) return initialized() ? NOT_SUPPORTED : UNINITIALIZED;
    WITH_DEVICE(device, {
        pthread_mutex_lock(&lock);
        if (!set_ok(set)) code = INVALID_ARGUMENT;
        else if (set->watched == MAX_WATCHED) code = MEMORY;
        else if (types) {
            /* What happened before is not told: only from here on. */
            set->told[set->watched] = d->health == XID;
            set->devices[set->watched++] = device;
        }
        pthread_mutex_unlock(&lock);
    });
}

typedef struct {
    nvmlDevice_t device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} event_t;

/* Looks once for a device that turned bad; true with the event filled in when there is one. */
static bool next_event(event_set_t *set, const snapshot_t *s, event_t *event) {
    for (unsigned i = 0; i < set->watched; i++) {
        int at = device_named(s, set->devices[i]->uuid);
        health_t health = at < 0 ? LOST : s->devices[at].health;
        if (health == HEALTHY) set->told[i] = false;
        else if (!set->told[i]) {
            set->told[i] = true;
            unsigned long long xid = health == LOST ? 79 : s->devices[at].xid; /* 79: fell off the bus */
            *event = (event_t){set->devices[i], EVENT_XID, xid, NO_INSTANCE, NO_INSTANCE};
            return true;
        }
    }
    return false;
}

API nvmlReturn_t nvmlEventSetWait_v2(event_set_t *set, event_t *event, unsigned timeout_ms) {
    if (!initialized()) return UNINITIALIZED;
    if (!event) return INVALID_ARGUMENT;
    struct timespec begun, now;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    for (;;) {
        snapshot_t *s;
        nvmlReturn_t code = load(&s);
        if (code != OK) return code;
        pthread_mutex_lock(&lock);
        bool good = set_ok(set), happened = good && next_event(set, s, event);
        pthread_mutex_unlock(&lock);
        drop(s);
        if (!good) return INVALID_ARGUMENT;
        if (happened) return OK;
        clock_gettime(CLOCK_MONOTONIC, &now);
        long long gone = (now.tv_sec - begun.tv_sec) * 1000LL + (now.tv_nsec - begun.tv_nsec) / 1000000;
        if (gone >= (long long)timeout_ms) return TIMEOUT;
        long long rest = (long long)timeout_ms - gone, nap = rest < 100 ? rest : 100;
        nanosleep(&(struct timespec){0, nap * 1000000}, NULL);
    }
}
API nvmlReturn_t nvmlEventSetWait(event_set_t *set, event_t *event, unsigned timeout_ms) {
    return nvmlEventSetWait_v2(set, event, timeout_ms);
}

/* ---- what these GPUs do not do ------------------------------------------------------------------------------- */

/* The device is the first argument of each; the others are never looked at. */
#define LACKS(name)                                                                                                    \
    API nvmlReturn_t name(nvmlDevice_t device) { WITH_DEVICE(device, code = NOT_SUPPORTED); }
LACKS(nvmlDeviceSetMigMode)
LACKS(nvmlDeviceGetGpuInstanceProfileInfo)
LACKS(nvmlDeviceGetAttributes_v2)
LACKS(nvmlDeviceGetTemperature)
LACKS(nvmlDeviceGetTemperatureThreshold)
LACKS(nvmlDeviceGetPowerUsage)
LACKS(nvmlDeviceGetPowerManagementLimit)
LACKS(nvmlDeviceGetPowerManagementMode)
LACKS(nvmlDeviceGetEnforcedPowerLimit)
LACKS(nvmlDeviceGetTotalEnergyConsumption)
LACKS(nvmlDeviceGetPerformanceState)
LACKS(nvmlDeviceGetPowerState)
LACKS(nvmlDeviceGetClockInfo)
LACKS(nvmlDeviceGetMaxClockInfo)
LACKS(nvmlDeviceGetFanSpeed)
LACKS(nvmlDeviceGetFanSpeed_v2)
LACKS(nvmlDeviceGetNumFans)
LACKS(nvmlDeviceGetEncoderUtilization)
LACKS(nvmlDeviceGetDecoderUtilization)
LACKS(nvmlDeviceGetProcessUtilization)
LACKS(nvmlDeviceGetSamples)
LACKS(nvmlDeviceGetFieldValues)
LACKS(nvmlDeviceGetEccMode)
LACKS(nvmlDeviceGetTotalEccErrors)
LACKS(nvmlDeviceGetMemoryErrorCounter)
LACKS(nvmlDeviceGetRetiredPages)
LACKS(nvmlDeviceGetRetiredPages_v2)
LACKS(nvmlDeviceGetRemappedRows)
LACKS(nvmlDeviceGetBAR1MemoryInfo)
LACKS(nvmlDeviceGetNvLinkState)
LACKS(nvmlDeviceGetPcieThroughput)
LACKS(nvmlDeviceGetSerial)
LACKS(nvmlDeviceGetBoardPartNumber)
LACKS(nvmlDeviceGetBoardId)
LACKS(nvmlDeviceGetBrand)
LACKS(nvmlDeviceGetArchitecture)
LACKS(nvmlDeviceGetCudaComputeCapability)
LACKS(nvmlDeviceGetNumGpuCores)
LACKS(nvmlDeviceGetVbiosVersion)
LACKS(nvmlDeviceGetAccountingMode)
LACKS(nvmlDeviceGetAccountingStats)
LACKS(nvmlDeviceGetAccountingPids)
LACKS(nvmlDeviceGetVirtualizationMode)
LACKS(nvmlDeviceSetPersistenceMode)
LACKS(nvmlDeviceSetComputeMode)
LACKS(nvmlDeviceSetPowerManagementLimit)
LACKS(nvmlDeviceGetCurrentClocksEventReasons)
LACKS(nvmlDeviceGetCurrentClocksThrottleReasons)
LACKS(nvmlDeviceGetRunningProcessDetailList)
