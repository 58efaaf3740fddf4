/* A disk with a quota, and one that takes its time to sync: preloaded before the C library by test_disk.py.
 *
 * What a process writes below the folder FAULTY_FOLDER is refused with EDQUOT after FAULTY_QUOTA bytes, where that is
 * set; fsync of a file or folder there takes FAULTY_FSYNC_S seconds.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_llong written;

static int is_below(int descriptor) {
    const char *folder = getenv("FAULTY_FOLDER");
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = folder ? readlink(link, path, sizeof path - 1) : -1;
    if (length < 0)
        return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int is_over(int descriptor, size_t count) {
    const char *quota = getenv("FAULTY_QUOTA");
    if (!quota || !is_below(descriptor))
        return 0;
    return atomic_fetch_add(&written, (long long)count) + (long long)count > atoll(quota);
}

ssize_t write(int descriptor, const void *buffer, size_t count) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real)
        real = dlsym(RTLD_NEXT, "write");
    if (is_over(descriptor, count)) {
        errno = EDQUOT;
        return -1;
    }
    return real(descriptor, buffer, count);
}

int fsync(int descriptor) {
    static int (*real)(int);
    if (!real)
        real = dlsym(RTLD_NEXT, "fsync");
    const char *seconds = getenv("FAULTY_FSYNC_S");
    if (seconds && is_below(descriptor))
        usleep((useconds_t)(atof(seconds) * 1e6));
    return real(descriptor);
}
