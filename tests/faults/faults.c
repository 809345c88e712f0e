/* Preloaded into a process, counts its operations on files below a folder, and kills it at one of them or lets it fail.
 *
 * A write at which the process is killed, or the disk is full, has written half before. A full disk stays full: what
 * needs room fails from then on, while files can still be closed, renamed and removed. Any other error occurs once.
 * Armed by a call of faults_arm, or by FAULTS="N ERROR FOLDER" in the environment, which processes that are started
 * inherit; ERROR 0 kills.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MOST 100000

enum { PASS, HALF, FAIL };

static char folder[PATH_MAX]; /* empty: nothing is counted */
static long armed_at;         /* the operation to disturb, counted from 1; 0 for none */
static int armed_error;       /* 0: kill */
static atomic_long counted;
static atomic_int full;
static char kinds[MOST]; /* the first letter of each operation's name; W for a write, R for a rename */

static int below(const char *path) {
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (path[length] == '/' || path[length] == 0);
}

static int concerns(int base, const char *path) {
    char where[PATH_MAX], link[64];
    if (!folder[0]) return 0;
    if (path[0] == '/') return below(path);
    if (base == AT_FDCWD) {
        if (!getcwd(where, sizeof where)) return 0;
        strncat(where, "/", sizeof where - strlen(where) - 1);
        strncat(where, path, sizeof where - strlen(where) - 1);
        return below(where);
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", base);
    ssize_t size = readlink(link, where, sizeof where - 1);
    if (size < 0) return 0;
    where[size] = 0;
    return below(where);
}

static int concerns_file(int descriptor) {
    char where[PATH_MAX], link[64];
    if (!folder[0]) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, where, sizeof where - 1);
    errno = before;
    if (size < 0) return 0;
    where[size] = 0;
    return below(where);
}

/* Counts an operation that concerns the folder, and tells what to do; room: whether it needs room on the disk. */
static int disturb(char kind, int room) {
    long number = ++counted;
    if (number < MOST) kinds[number] = kind;
    if (full && room) {
        errno = ENOSPC;
        return FAIL;
    }
    if (number != armed_at) return PASS;
    if (kind == 'W' && (armed_error == 0 || armed_error == ENOSPC)) {
        full = armed_error == ENOSPC;
        return HALF;
    }
    if (armed_error == 0) raise(SIGKILL);
    full = armed_error == ENOSPC;
    errno = armed_error;
    return FAIL;
}

EXPORT void faults_arm(const char *below_folder, long number, int error) {
    counted = 0;
    full = 0;
    armed_at = number;
    armed_error = error;
    snprintf(folder, sizeof folder, "%s", below_folder);
}

EXPORT long faults_disarm(void) {
    folder[0] = 0;
    return counted;
}

EXPORT const char *faults_kinds(void) { return kinds + 1; }

__attribute__((constructor)) static void arm_by_environment(void) {
    const char *words = getenv("FAULTS");
    long number;
    int error, end;
    if (words && sscanf(words, "%ld %d %n", &number, &error, &end) == 2) faults_arm(words + end, number, error);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPENED(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))

#define OPEN(name) \
    EXPORT int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (OPENED(flags) && concerns(AT_FDCWD, path) && disturb('o', 1)) return -1; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    EXPORT int name(int base, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (OPENED(flags) && concerns(base, path) && disturb('o', 1)) return -1; \
        return real(base, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    EXPORT FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        if (strpbrk(mode, "wa+") && concerns(AT_FDCWD, path) && disturb('o', 1)) return NULL; \
        return real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define WRITE(name, more, pass) \
    EXPORT ssize_t name(int file, const void *bytes, size_t size more) { \
        REAL(name); \
        int what = concerns_file(file) ? disturb('W', 1) : PASS; \
        if (what == FAIL) return -1; \
        if (what == HALF) size /= 2; \
        ssize_t written = real(file, bytes, size pass); \
        if (what == HALF && armed_error == 0) raise(SIGKILL); \
        return what == HALF && size == 0 ? (errno = ENOSPC, -1) : written; \
    }
#define COMMA ,
WRITE(write, , )
WRITE(pwrite, COMMA off_t at, COMMA at)
WRITE(pwrite64, COMMA off64_t at, COMMA at)

EXPORT ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev);
    if (concerns_file(file)) {
        int what = disturb('W', 1);
        if (what == HALF && armed_error == 0) raise(SIGKILL);
        if (what != PASS) return errno = armed_error, -1;
    }
    return real(file, parts, count);
}

/* What is done to a file that is open, to one that has a name, and to one that has a name in a folder that is open. */
#define BY_FILE(name, kind, room, parameters, arguments) \
    EXPORT int name parameters { \
        REAL(name); \
        if (concerns_file(file) && disturb(kind, room)) return -1; \
        return real arguments; \
    }
#define BY_NAME(name, kind, room, parameters, arguments) \
    EXPORT int name parameters { \
        REAL(name); \
        if (concerns(AT_FDCWD, path) && disturb(kind, room)) return -1; \
        return real arguments; \
    }
#define BY_PLACE(name, kind, room, parameters, arguments) \
    EXPORT int name parameters { \
        REAL(name); \
        if (concerns(base, path) && disturb(kind, room)) return -1; \
        return real arguments; \
    }
BY_FILE(fsync, 'f', 1, (int file), (file))
BY_FILE(fdatasync, 'f', 1, (int file), (file))
BY_FILE(ftruncate, 't', 0, (int file, off_t size), (file, size))
BY_FILE(ftruncate64, 't', 0, (int file, off64_t size), (file, size))
BY_NAME(truncate, 't', 0, (const char *path, off_t size), (path, size))
BY_NAME(truncate64, 't', 0, (const char *path, off64_t size), (path, size))
BY_NAME(rename, 'R', 0, (const char *path, const char *to), (path, to))
BY_PLACE(renameat, 'R', 0, (int base, const char *path, int other, const char *to), (base, path, other, to))
BY_PLACE(renameat2, 'R', 0, (int base, const char *path, int other, const char *to, unsigned flags),
         (base, path, other, to, flags))
BY_NAME(unlink, 'u', 0, (const char *path), (path))
BY_PLACE(unlinkat, 'u', 0, (int base, const char *path, int flags), (base, path, flags))
BY_NAME(rmdir, 'u', 0, (const char *path), (path))
BY_NAME(mkdir, 'm', 1, (const char *path, mode_t mode), (path, mode))
BY_PLACE(mkdirat, 'm', 1, (int base, const char *path, mode_t mode), (base, path, mode))

/* A file is closed also if that fails. */
EXPORT int close(int file) {
    REAL(close);
    int what = concerns_file(file) && (fcntl(file, F_GETFL) & O_ACCMODE) != O_RDONLY ? disturb('c', 0) : PASS;
    int error = errno, result = real(file);
    if (what == PASS) return result;
    errno = error;
    return -1;
}
