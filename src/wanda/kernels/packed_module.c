/* Python's view of packed.h. */
#include "arguments.h"
#include "bandwidth.h"
#include "packed.h"

static matrix matrix_of(const int64_t *a) {
    return (matrix){.kind = (int)a[0],
                    .rows = a[1],
                    .width = a[2],
                    .mask = (const uint64_t *)(intptr_t)a[3],
                    .offsets = (const uint32_t *)(intptr_t)a[4],
                    .values = (const void *)(intptr_t)a[5]};
}

static PyObject *level_of_machine(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    return PyLong_FromLong(best_level());
}

/* kind rows width mask offsets values | level threads pool | kind x x_stride columns out out_stride bias */
static PyObject *multiply(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    int64_t a[MOST_ARGUMENTS];
    (void)self;
    if (!integers(arguments, given, 16, a)) return NULL;
    const product p = {.m = matrix_of(a),
                       .kind = (int)a[9],
                       .x = (const void *)(intptr_t)a[10],
                       .x_stride = a[11],
                       .columns = a[12],
                       .out = (void *)(intptr_t)a[13],
                       .out_stride = a[14],
                       .bias = (const void *)(intptr_t)a[15]};
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = matrix_product(&p, (int)a[6], (int)a[7], POOL(a[8]));
    Py_END_ALLOW_THREADS;
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* kind rows width mask offsets values | level -> bool */
static PyObject *pays(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    int64_t a[MOST_ARGUMENTS];
    (void)self;
    if (!integers(arguments, given, 7, a)) return NULL;
    const matrix m = matrix_of(a);
    return PyBool_FromLong(skipping_pays(&m, (int)a[6]));
}

/* kind rows width mask offsets values | level threads pool | first last kind out */
static PyObject *expand(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    int64_t a[MOST_ARGUMENTS];
    (void)self;
    if (!integers(arguments, given, 13, a)) return NULL;
    const matrix m = matrix_of(a);
    Py_BEGIN_ALLOW_THREADS;
    expand_rows(&m, a[9], a[10], (int)a[11], (void *)(intptr_t)a[12], (int)a[6], (int)a[7], POOL(a[8]));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* kind rows width mask offsets values | capacity threads pool -> first bad row or -1 */
static PyObject *check(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    int64_t a[MOST_ARGUMENTS], bad;
    (void)self;
    if (!integers(arguments, given, 9, a)) return NULL;
    const matrix m = matrix_of(a);
    Py_BEGIN_ALLOW_THREADS;
    bad = first_bad_row(&m, a[6], (int)a[7], POOL(a[8]));
    Py_END_ALLOW_THREADS;
    return PyLong_FromLongLong(bad);
}

/* kind rows width dense mask counts | threads pool */
static PyObject *mark(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    int64_t a[MOST_ARGUMENTS];
    (void)self;
    if (!integers(arguments, given, 8, a)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    mark_survivors((int)a[0], a[1], a[2], (const void *)(intptr_t)a[3], (uint64_t *)(intptr_t)a[4],
                   (uint32_t *)(intptr_t)a[5], (int)a[6], POOL(a[7]));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* kind rows width mask offsets values | dense threads pool */
static PyObject *gather(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    int64_t a[MOST_ARGUMENTS];
    (void)self;
    if (!integers(arguments, given, 9, a)) return NULL;
    const matrix m = matrix_of(a);
    Py_BEGIN_ALLOW_THREADS;
    gather_survivors(&m, (const void *)(intptr_t)a[6], (void *)m.values, (int)a[7], POOL(a[8]));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* words count threads pool -> exclusive or */
static PyObject *read_all(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    int64_t a[MOST_ARGUMENTS];
    uint64_t sum;
    (void)self;
    if (!integers(arguments, given, 4, a)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    sum = read_memory((const uint64_t *)(intptr_t)a[0], a[1], (int)a[2], POOL(a[3]));
    Py_END_ALLOW_THREADS;
    return PyLong_FromUnsignedLongLong(sum);
}

PyMethodDef packed_methods[] = {
    {"best_level", level_of_machine, METH_NOARGS, "The best dispatch level of this machine."},
    {"packed_multiply", (PyCFunction)(void (*)(void))multiply, METH_FASTCALL, "Product with a packed matrix."},
    {"packed_skipping_pays", (PyCFunction)(void (*)(void))pays, METH_FASTCALL, "Whether few enough weights survive."},
    {"packed_expand", (PyCFunction)(void (*)(void))expand, METH_FASTCALL, "Rows of a packed matrix as dense ones."},
    {"packed_check", (PyCFunction)(void (*)(void))check, METH_FASTCALL, "First row whose structure is wrong."},
    {"packed_mark", (PyCFunction)(void (*)(void))mark, METH_FASTCALL, "Mask and counts of a dense matrix."},
    {"packed_gather", (PyCFunction)(void (*)(void))gather, METH_FASTCALL, "Survivors of a dense matrix."},
    {"read_memory", (PyCFunction)(void (*)(void))read_all, METH_FASTCALL, "Exclusive or of 64-bit words."},
    {NULL, NULL, 0, NULL}};
