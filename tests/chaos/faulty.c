/* Faults of disk and clock, for a process that loads this library before libc (LD_PRELOAD).
 *
 * In: the file that CHAOS_CONTROL names, mapped by every process, so that what is written there holds at once. Its
 * layout is struct control; tests/chaos/faulty.py has the other side. Out: write, writev, fsync, fdatasync and rename
 * that fail, are slow, or wait, and a clock that is off. Without the file all is as ever.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, RENAME = 4 };
enum { FAIL = 1, DELAY = 2, PAUSE = 3 };

struct rule {
    volatile int32_t active; /* PAUSE lasts until this is 0 */
    volatile int32_t hits;   /* calls that it was for so far, those it let pass too */
    int32_t calls;           /* WRITE | SYNC | RENAME */
    int32_t action;
    int32_t error;       /* of FAIL */
    int32_t rank;        /* of the process by its RANK; -1: any */
    int32_t passed;      /* how many calls are let pass first */
    volatile int32_t turn;   /* another one each time the place of a rule is taken again */
    int64_t nanoseconds; /* of DELAY */
    char path[224];      /* a pattern of fnmatch for the whole path, of a rename the old one */
    char content[32];    /* what the bytes written contain; empty: anything */
};

struct control {
    volatile int64_t clock_shift; /* nanoseconds */
    struct rule rules[8];
};

static struct control *control;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("CHAOS_CONTROL");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *mapped = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED) control = mapped;
}

static void wait_for(int64_t nanoseconds) {
    struct timespec left = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    while (nanosleep(&left, &left) < 0 && errno == EINTR) {
    }
}

static int is_of_rank(int32_t rank) {
    const char *mine = getenv("RANK");
    return rank < 0 || (mine && atoi(mine) == rank);
}

/* Does what the rules say of a call; the rule that makes it fail, if one does. */
static struct rule *meet(int call, const char *path, const void *content, size_t size) {
    for (int i = 0; i < (int)(sizeof(control->rules) / sizeof(control->rules[0])); i++) {
        struct rule *rule = &control->rules[i];
        if (!rule->active || !(rule->calls & call) || !is_of_rank(rule->rank)) continue;
        if (fnmatch(rule->path, path, 0)) continue;
        if (rule->content[0] && (!content || !memmem(content, size, rule->content, strlen(rule->content)))) continue;
        if (__atomic_add_fetch(&rule->hits, 1, __ATOMIC_SEQ_CST) <= rule->passed) continue;
        if (rule->action == FAIL) return rule;
        if (rule->action == DELAY) wait_for(rule->nanoseconds);
        int turn = rule->turn;
        while (rule->action == PAUSE && rule->active && rule->turn == turn) wait_for(2000000);
    }
    return NULL;
}

static struct rule *meet_file(int call, int file, const void *content, size_t size) {
    if (!control) return NULL;
    int before = errno;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof(path) - 1);
    struct rule *found = NULL;
    if (length > 0 && path[0] == '/') {
        path[length] = 0;
        found = meet(call, path, content, size);
    }
    errno = before;
    return found;
}

ssize_t write(int file, const void *content, size_t size) {
    struct rule *fault = meet_file(WRITE, file, content, size);
    /* A disk that fills takes a part first. */
    if (fault && fault->hits == fault->passed + 1 && size > 1) return syscall(SYS_write, file, content, size / 2);
    if (fault) {
        errno = fault->error;
        return -1;
    }
    return syscall(SYS_write, file, content, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    struct rule *fault = meet_file(WRITE, file, count > 0 ? parts[0].iov_base : NULL, count > 0 ? parts[0].iov_len : 0);
    if (fault) {
        errno = fault->error;
        return -1;
    }
    return syscall(SYS_writev, file, parts, count);
}

static int synced(int file, long number) {
    struct rule *fault = meet_file(SYNC, file, NULL, 0);
    if (fault) {
        errno = fault->error;
        return -1;
    }
    return syscall(number, file);
}

int fsync(int file) { return synced(file, SYS_fsync); }

int fdatasync(int file) { return synced(file, SYS_fdatasync); }

int rename(const char *from, const char *to) {
    struct rule *fault = control ? meet(RENAME, from, NULL, 0) : NULL;
    if (fault) {
        errno = fault->error;
        return -1;
    }
    return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

/* Of the clock of the day only: a machine's clock that is set leaves its monotonic one alone. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *); /* libc's, which needs no system call */
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (!code && control && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t shifted = now->tv_sec * 1000000000LL + now->tv_nsec + control->clock_shift;
        now->tv_sec = shifted / 1000000000;
        now->tv_nsec = shifted % 1000000000;
    }
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec exact;
    int code = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return code;
}

time_t time(time_t *seconds) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (seconds) *seconds = exact.tv_sec;
    return exact.tv_sec;
}
