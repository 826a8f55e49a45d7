/* Python's view of select.h. */
#include "arguments.h"
#include "select.h"

/* rows n scores stride counts step marked | few level threads pool */
static PyObject *mark(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    int64_t a[MOST_ARGUMENTS];
    (void)self;
    if (!integers(arguments, given, 11, a)) return NULL;
    const selection s = {.rows = a[0],
                         .n = a[1],
                         .scores = (const float *)(intptr_t)a[2],
                         .row_stride = a[3],
                         .counts = (const int64_t *)(intptr_t)a[4],
                         .count_step = a[5],
                         .marked = (uint8_t *)(intptr_t)a[6]};
    Py_BEGIN_ALLOW_THREADS;
    (a[7] ? mark_lowest_of_few : mark_lowest)(&s, (int)a[8], (int)a[9], POOL(a[10]));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* size rows n values stride kept | threads pool */
static PyObject *clear(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    int64_t a[MOST_ARGUMENTS];
    (void)self;
    if (!integers(arguments, given, 8, a)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    clear_lost((int)a[0], a[1], a[2], (void *)(intptr_t)a[3], a[4], (const uint8_t *)(intptr_t)a[5], (int)a[6],
               POOL(a[7]));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyMethodDef select_methods[] = {
    {"mark_lowest", (PyCFunction)(void (*)(void))mark, METH_FASTCALL, "The lowest scores of every row."},
    {"clear_lost", (PyCFunction)(void (*)(void))clear, METH_FASTCALL, "Zeros where a mask is 0."},
    {NULL, NULL, 0, NULL}};
