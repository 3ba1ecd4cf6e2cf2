/* Uses the stand-in library the way a C program does; run by hack/lab/tests/nvml.rs with three processes of 1 GiB on
   one GPU of 24 GiB. Ends with 0 when every answer is the real library's. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct device *device_t;
typedef struct {
    unsigned long long total, free, used;
} memory_t;
typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} process_t;

unsigned nvmlInit_v2(void);
unsigned nvmlShutdown(void);
const char *nvmlErrorString(unsigned);
unsigned nvmlDeviceGetCount_v2(unsigned *);
unsigned nvmlDeviceGetHandleByIndex_v2(unsigned, device_t *);
unsigned nvmlDeviceGetMemoryInfo(device_t, memory_t *);
unsigned nvmlDeviceGetMemoryInfo_v2(device_t, void *);
unsigned nvmlDeviceGetUUID(device_t, char *, unsigned);
unsigned nvmlDeviceGetMigMode(device_t, unsigned *, unsigned *);
unsigned nvmlDeviceGetComputeRunningProcesses_v3(device_t, unsigned *, process_t *);

static void expect(const char *what, unsigned long long got, unsigned long long wanted) {
    if (got == wanted) return;
    fprintf(stderr, "%s: %llu, expected %llu\n", what, got, wanted);
    exit(1);
}

int main(void) {
    unsigned count = 77;
    device_t device;
    expect("count before init", nvmlDeviceGetCount_v2(&count), 1);
    expect("shutdown before init", nvmlShutdown(), 1);
    expect("init", nvmlInit_v2(), 0);
    expect("init again", nvmlInit_v2(), 0);
    expect("shutdown", nvmlShutdown(), 0);
    expect("count", nvmlDeviceGetCount_v2(&count), 0);
    expect("devices", count, 1);
    expect("count to nowhere", nvmlDeviceGetCount_v2(NULL), 2);
    expect("handle", nvmlDeviceGetHandleByIndex_v2(0, &device), 0);

    memory_t memory;
    expect("memory", nvmlDeviceGetMemoryInfo(device, &memory), 0);
    expect("used with reserved", memory.used, (3ULL << 30) + (1ULL << 29));
    expect("free", memory.free, (24ULL << 30) - memory.used);
    unsigned wrong_version[12] = {0};
    expect("version 0", nvmlDeviceGetMemoryInfo_v2(device, wrong_version), 25);

    char uuid[41];
    expect("uuid too short", nvmlDeviceGetUUID(device, uuid, 40), 7);
    expect("uuid", nvmlDeviceGetUUID(device, uuid, 41), 0);
    expect("uuid starts", strncmp(uuid, "GPU-", 4), 0);

    process_t processes[4];
    memset(processes, 0xee, sizeof processes);
    count = 0;
    expect("asking the count", nvmlDeviceGetComputeRunningProcesses_v3(device, &count, NULL), 7);
    expect("needed", count, 3);
    count = 2;
    expect("too few", nvmlDeviceGetComputeRunningProcesses_v3(device, &count, processes), 7);
    expect("needed", count, 3);
    expect("nothing past the buffer", processes[2].pid, 0xeeeeeeee);
    count = 4;
    expect("enough", nvmlDeviceGetComputeRunningProcesses_v3(device, &count, processes), 0);
    expect("processes", count, 3);
    expect("pid", processes[2].pid, 3);
    expect("bytes", processes[2].used, 1ULL << 30);
    expect("not in a MIG instance", processes[2].gpu_instance, 0xffffffff);
    expect("nothing past the count", processes[3].pid, 0xeeeeeeee);
    expect("no count", nvmlDeviceGetComputeRunningProcesses_v3(device, NULL, processes), 2);

    unsigned current, pending;
    expect("MIG", nvmlDeviceGetMigMode(device, &current, &pending), 3);
    int foreign;
    expect("foreign handle", nvmlDeviceGetMemoryInfo((device_t)&foreign, &memory), 2);
    expect("no handle", nvmlDeviceGetMemoryInfo(NULL, &memory), 2);
    expect("shifted handle", nvmlDeviceGetMemoryInfo((device_t)((char *)device + 1), &memory), 2);

    expect("text", strcmp(nvmlErrorString(15), "GPU is lost"), 0);
    expect("text of nonsense", strcmp(nvmlErrorString(12345), "Unknown Error"), 0);
    expect("last shutdown", nvmlShutdown(), 0);
    expect("after the end", nvmlDeviceGetMemoryInfo(device, &memory), 1);
    return 0;
}
