/*
 * Loaded into a process with LD_PRELOAD, writes down what the process does to the files of one folder, in the order in
 * which it happens: what is created, written, cut, removed and synced. A power failure is made from that afterwards.
 *
 * Nothing is synced in truth: which sync there was is all that counts. What is mapped into memory is not seen.
 * C, since a process can only be watched like this from outside of safe Rust.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/uio.h>
#include <unistd.h>

/* What stands before each event; then come the file's name and what was written. */
struct head {
    uint32_t kind;
    uint32_t name;
    uint64_t at;
    uint64_t size;
};

static pthread_mutex_t threads = PTHREAD_MUTEX_INITIALIZER;
static const char *folder;
static int trace = -1;

/* The function of this name that would be called without us. */
#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int open_untold(const char *path, int flags) {
    REAL(open);
    return real(path, flags, 0600);
}

__attribute__((constructor)) static void set_up(void) {
    const char *path = getenv("POWER_TRACE");
    folder = getenv("POWER_FOLDER");
    if (folder && path) trace = open_untold(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC);
}

/* The name in the folder that this path has, "" for the folder itself; NULL if it is none of ours. */
static const char *name_of(const char *path) {
    size_t size = trace < 0 ? 0 : strlen(folder);
    if (!size || strncmp(path, folder, size)) return NULL;
    if (!path[size]) return "";
    return path[size] == '/' ? path + size + 1 : NULL;
}

/* As name_of, for an open file. One that was removed is none of ours any more. */
static const char *name_of_open(int fd, char path[PATH_MAX]) {
    static const char removed[] = " (deleted)";
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int error = errno;
    ssize_t size = trace < 0 ? -1 : readlink(link, path, PATH_MAX - 1);
    errno = error;
    if (size < 0) return NULL;
    path[size] = 0;
    size_t end = sizeof removed - 1;
    if ((size_t)size > end && !strcmp(path + size - end, removed)) return NULL;
    return name_of(path);
}

/* Whoever has its turn is alone among all threads of all processes with this trace. */
static void take_turn(void) {
    pthread_mutex_lock(&threads);
    flock(trace, LOCK_EX);
}

static void end_turn(void) {
    int error = errno;
    flock(trace, LOCK_UN);
    pthread_mutex_unlock(&threads);
    errno = error;
}

static void append(char kind, const char *name, uint64_t at, const void *data, size_t size) {
    struct head head = {(uint32_t)kind, (uint32_t)strlen(name), at, size};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)name, head.name}, {(void *)data, size}};
    size_t all = sizeof head + head.name + size;
    if (writev(trace, parts, 3) != (ssize_t)all) abort();
}

/* Makes a call, and an event of it unless it fails. */
#define TOLD(type, call, kind, name, at, data, size) \
    take_turn();                                     \
    type done = call;                                \
    if (done >= 0) append(kind, name, at, data, size); \
    end_turn();                                      \
    return done

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    REAL(write);
    const char *name = name_of_open(fd, path);
    if (!name) return real(fd, data, size);
    TOLD(ssize_t, real(fd, data, size), 'w', name, lseek(fd, 0, SEEK_CUR) - done, data, done);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    char path[PATH_MAX];
    REAL(pwrite);
    const char *name = name_of_open(fd, path);
    if (!name) return real(fd, data, size, at);
    TOLD(ssize_t, real(fd, data, size, at), 'w', name, at, data, done);
}

int ftruncate(int fd, off_t size) {
    char path[PATH_MAX];
    REAL(ftruncate);
    const char *name = name_of_open(fd, path);
    if (!name) return real(fd, size);
    TOLD(int, real(fd, size), 't', name, size, NULL, 0);
}

int fsync(int fd) {
    char path[PATH_MAX];
    REAL(fsync);
    const char *name = name_of_open(fd, path);
    if (!name) return real(fd);
    TOLD(int, 0, 's', name, 0, NULL, 0);
}

int fdatasync(int fd) {
    return fsync(fd);
}

int unlink(const char *path) {
    REAL(unlink);
    const char *name = name_of(path);
    if (!name) return real(path);
    TOLD(int, real(path), 'u', name, 0, NULL, 0);
}

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    REAL(open);
    const char *name = name_of(path);
    if (!name || !(flags & (O_CREAT | O_TRUNC))) return real(path, flags, mode);
    take_turn();
    int is_new = access(path, F_OK);
    int fd = real(path, flags, mode);
    if (fd >= 0 && is_new) append('c', name, 0, NULL, 0);
    else if (fd >= 0 && flags & O_TRUNC) append('t', name, 0, NULL, 0);
    end_turn();
    return fd;
}

/* The same for programs that ask for large files, where all files are large. */
_Static_assert(sizeof(off_t) == 8, "the recorder needs 64-bit offsets");
ssize_t pwrite64(int, const void *, size_t, off64_t) __attribute__((alias("pwrite")));
int ftruncate64(int, off64_t) __attribute__((alias("ftruncate")));
int open64(const char *, int, ...) __attribute__((alias("open")));
