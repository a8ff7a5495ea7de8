/* Records what a process does to the files below one directory, in order, so that a test can ask what a power cut
 * would have left of it; and can make the n-th sync fail. Loaded with LD_PRELOAD.
 *
 *   RECORDER_ROOT   absolute path of the directory whose files are watched
 *   RECORDER_LOG    file that the events are appended to
 *   RECORDER_FAIL   n: the n-th sync (from 1) of a path that contains RECORDER_FAIL_PATH gets EIO
 *
 * An event is `struct event`, then its two paths and its data. A write is recorded in the same critical section in which
 * it is done, so the order of events is that of the files. A sync has two events, because writes that run beside it are
 * not covered. Calls that change files in a way that is not recorded here end the process: silence would be a lie.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { CREATE = 1, WRITE, TRUNCATE, SYNC_BEGIN, SYNC_END, RENAME, UNLINK, MAKE_DIRECTORY };

struct event {
    uint32_t kind, failed;
    uint64_t inode, number, data_bytes; /* number: offset, new size or number of the sync */
    uint32_t path_bytes, other_path_bytes;
};

enum { DESCRIPTORS = 65536 };

static char root[4096];
static size_t root_bytes;
static int log_descriptor = -1;
static long fail_at;
static const char *fail_path = "";
static unsigned long syncs, matching_syncs;
static unsigned char watched[DESCRIPTORS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void stop(const char *why, const char *what) {
    dprintf(2, "write_recorder: %s %s\n", why, what);
    _exit(97);
}

__attribute__((constructor)) static void start(void) {
    const char *directory = getenv("RECORDER_ROOT"), *log = getenv("RECORDER_LOG");
    if (!directory || !log)
        return;
    root_bytes = strlen(directory);
    memcpy(root, directory, root_bytes + 1);
    log_descriptor = REAL(open64)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log_descriptor < 0)
        stop("can't write", log);
    fail_at = getenv("RECORDER_FAIL") ? atol(getenv("RECORDER_FAIL")) : 0;
    fail_path = getenv("RECORDER_FAIL_PATH") ? getenv("RECORDER_FAIL_PATH") : "";
}

/* Make a path absolute; whether it is the root or lies below it. */
static int below_root(int directory, const char *path, char *absolute) {
    if (log_descriptor < 0)
        return 0;
    if (path[0] == '/')
        snprintf(absolute, 4096, "%s", path);
    else {
        char link[64], base[2048];
        if (directory == AT_FDCWD)
            snprintf(link, sizeof link, "/proc/self/cwd");
        else
            snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, base, sizeof base - 1);
        base[length < 0 ? 0 : length] = 0;
        snprintf(absolute, 4096, "%s/%s", base, path);
    }
    return !strncmp(absolute, root, root_bytes) && (absolute[root_bytes] == '/' || !absolute[root_bytes]);
}

static void record(enum kind kind, int failed, uint64_t inode, uint64_t number, const char *path, const char *other,
                   const void *data, size_t bytes) {
    struct event event = {kind, failed, inode, number, bytes, strlen(path), strlen(other)};
    struct iovec parts[] = {
        {&event, sizeof event},
        {(void *)path, event.path_bytes},
        {(void *)other, event.other_path_bytes},
        {(void *)data, bytes},
    };
    ssize_t whole = sizeof event + event.path_bytes + event.other_path_bytes + bytes;
    if (REAL(writev)(log_descriptor, parts, 4) != whole)
        stop("can't record", path);
}

static int is_watched(int descriptor) {
    return descriptor >= 0 && descriptor < DESCRIPTORS && watched[descriptor];
}

static uint64_t inode_of(int descriptor) {
    struct stat found;
    return fstat(descriptor, &found) ? 0 : found.st_ino;
}

static int open_watched(int directory, const char *path, int flags, mode_t mode) {
    char absolute[4096];
    if (!below_root(directory, path, absolute))
        return REAL(openat64)(directory, path, flags, mode);
    pthread_mutex_lock(&lock);
    int existed = faccessat(directory, path, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
    int descriptor = REAL(openat64)(directory, path, flags, mode);
    int error = errno;
    if (descriptor >= DESCRIPTORS)
        stop("too many descriptors at", absolute);
    if (descriptor >= 0) {
        watched[descriptor] = 1;
        if (!existed)
            record(CREATE, 0, inode_of(descriptor), 0, absolute, "", "", 0);
        else if (flags & O_TRUNC)
            record(TRUNCATE, 0, inode_of(descriptor), 0, "", "", "", 0);
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return descriptor;
}

static mode_t mode_of(int flags, va_list rest) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = mode_of(flags, rest);                                                                            \
        va_end(rest);                                                                                                  \
        return open_watched(AT_FDCWD, path, flags, mode);                                                              \
    }
#define OPENAT(name)                                                                                                   \
    int name(int directory, const char *path, int flags, ...) {                                                        \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = mode_of(flags, rest);                                                                            \
        va_end(rest);                                                                                                  \
        return open_watched(directory, path, flags, mode);                                                             \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int close(int descriptor) {
    pthread_mutex_lock(&lock);
    if (is_watched(descriptor))
        watched[descriptor] = 0;
    int result = REAL(close)(descriptor);
    pthread_mutex_unlock(&lock);
    return result;
}

ssize_t write(int descriptor, const void *data, size_t bytes) {
    if (!is_watched(descriptor))
        return REAL(write)(descriptor, data, bytes);
    pthread_mutex_lock(&lock);
    ssize_t written = REAL(write)(descriptor, data, bytes);
    int error = errno;
    if (written > 0) {
        uint64_t end = lseek(descriptor, 0, SEEK_CUR); /* with O_APPEND too */
        record(WRITE, 0, inode_of(descriptor), end - written, "", "", data, written);
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return written;
}

static ssize_t write_at(int descriptor, const void *data, size_t bytes, off64_t offset) {
    if (!is_watched(descriptor))
        return REAL(pwrite64)(descriptor, data, bytes, offset);
    pthread_mutex_lock(&lock);
    ssize_t written = REAL(pwrite64)(descriptor, data, bytes, offset);
    int error = errno;
    if (written > 0)
        record(WRITE, 0, inode_of(descriptor), offset, "", "", data, written);
    pthread_mutex_unlock(&lock);
    errno = error;
    return written;
}

ssize_t pwrite(int descriptor, const void *data, size_t bytes, off_t offset) {
    return write_at(descriptor, data, bytes, offset);
}

ssize_t pwrite64(int descriptor, const void *data, size_t bytes, off64_t offset) {
    return write_at(descriptor, data, bytes, offset);
}

static int set_size(int descriptor, off64_t size) {
    if (!is_watched(descriptor))
        return REAL(ftruncate64)(descriptor, size);
    pthread_mutex_lock(&lock);
    int result = REAL(ftruncate64)(descriptor, size), error = errno;
    if (result == 0)
        record(TRUNCATE, 0, inode_of(descriptor), size, "", "", "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int ftruncate(int descriptor, off_t size) { return set_size(descriptor, size); }
int ftruncate64(int descriptor, off64_t size) { return set_size(descriptor, size); }

static int sync_watched(int descriptor, int (*real)(int)) {
    if (!is_watched(descriptor))
        return real(descriptor);
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    pthread_mutex_lock(&lock);
    uint64_t number = ++syncs, inode = inode_of(descriptor);
    int fails = strstr(path, fail_path) && (long)++matching_syncs == fail_at;
    record(SYNC_BEGIN, 0, inode, number, path, "", "", 0);
    pthread_mutex_unlock(&lock);
    int result = fails ? -1 : real(descriptor);
    pthread_mutex_lock(&lock);
    record(SYNC_END, result != 0, inode, number, path, "", "", 0);
    pthread_mutex_unlock(&lock);
    if (fails)
        errno = EIO;
    return result;
}

int fsync(int descriptor) { return sync_watched(descriptor, REAL(fsync)); }
int fdatasync(int descriptor) { return sync_watched(descriptor, REAL(fdatasync)); }

static int rename_watched(int from_directory, const char *from, int to_directory, const char *to) {
    char source[4096], target[4096];
    int result = below_root(from_directory, from, source), error;
    if (result != below_root(to_directory, to, target))
        stop("a rename across the root to", target);
    if (!result)
        return REAL(renameat)(from_directory, from, to_directory, to);
    pthread_mutex_lock(&lock);
    result = REAL(renameat)(from_directory, from, to_directory, to);
    error = errno;
    if (result == 0)
        record(RENAME, 0, 0, 0, source, target, "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int rename(const char *from, const char *to) { return rename_watched(AT_FDCWD, from, AT_FDCWD, to); }
int renameat(int a, const char *from, int b, const char *to) { return rename_watched(a, from, b, to); }

int unlinkat(int directory, const char *path, int flags) {
    char absolute[4096];
    if (!below_root(directory, path, absolute))
        return REAL(unlinkat)(directory, path, flags);
    if (flags & AT_REMOVEDIR)
        stop("a removed directory is not recorded:", absolute);
    pthread_mutex_lock(&lock);
    int result = REAL(unlinkat)(directory, path, flags), error = errno;
    if (result == 0)
        record(UNLINK, 0, 0, 0, absolute, "", "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int mkdirat(int directory, const char *path, mode_t mode) {
    char absolute[4096];
    if (!below_root(directory, path, absolute))
        return REAL(mkdirat)(directory, path, mode);
    pthread_mutex_lock(&lock);
    int result = REAL(mkdirat)(directory, path, mode), error = errno;
    if (result == 0)
        record(MAKE_DIRECTORY, 0, 0, 0, absolute, "", "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* SQLite maps its -shm file, which is no durable state; a mapping of anything else would write unseen. */
void *mmap64(void *address, size_t bytes, int protection, int flags, int descriptor, off64_t offset) {
    if (is_watched(descriptor) && (protection & PROT_WRITE) && (flags & MAP_SHARED)) {
        char link[64], path[4096];
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t length = readlink(link, path, sizeof path - 1);
        path[length < 0 ? 0 : length] = 0;
        if (length < 4 || strcmp(path + length - 4, "-shm"))
            stop("a shared mapping is not recorded:", path);
    }
    return REAL(mmap64)(address, bytes, protection, flags, descriptor, offset);
}

#define UNRECORDED(name, parameters, arguments)                                                                        \
    ssize_t name parameters {                                                                                          \
        if (is_watched(descriptor))                                                                                    \
            stop("not recorded:", #name);                                                                              \
        return ((ssize_t(*) parameters)dlsym(RTLD_NEXT, #name))arguments;                                              \
    }
UNRECORDED(writev, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count))
UNRECORDED(pwritev, (int descriptor, const struct iovec *parts, int count, off_t at), (descriptor, parts, count, at))
UNRECORDED(pwritev64, (int descriptor, const struct iovec *parts, int count, off64_t at), (descriptor, parts, count, at))
UNRECORDED(pwritev64v2, (int descriptor, const struct iovec *parts, int count, off64_t at, int flags),
           (descriptor, parts, count, at, flags))

#define UNRECORDED_STATUS(name, parameters, arguments)                                                                 \
    int name parameters {                                                                                              \
        if (is_watched(descriptor))                                                                                    \
            stop("not recorded:", #name);                                                                              \
        return ((int(*) parameters)dlsym(RTLD_NEXT, #name))arguments;                                                  \
    }
UNRECORDED_STATUS(fallocate64, (int descriptor, int mode, off64_t at, off64_t bytes), (descriptor, mode, at, bytes))
UNRECORDED_STATUS(posix_fallocate64, (int descriptor, off64_t at, off64_t bytes), (descriptor, at, bytes))
