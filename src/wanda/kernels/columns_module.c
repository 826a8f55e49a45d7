/* Python's view of columns.h. */
#include "arguments.h"
#include "columns.h"

/* kind rows width x stride out | level threads pool */
static PyObject *add_squares(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    int64_t a[MOST_ARGUMENTS];
    (void)self;
    if (!integers(arguments, given, 9, a)) return NULL;
    const column_squares c = {.kind = (int)a[0],
                              .rows = a[1],
                              .width = a[2],
                              .x = (const void *)(intptr_t)a[3],
                              .row_stride = a[4],
                              .out = (float *)(intptr_t)a[5]};
    Py_BEGIN_ALLOW_THREADS;
    add_column_squares(&c, (int)a[6], (int)a[7], POOL(a[8]));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyMethodDef columns_methods[] = {
    {"add_column_squares", (PyCFunction)(void (*)(void))add_squares, METH_FASTCALL, "out += sums of squares of columns."},
    {NULL, NULL, 0, NULL}};
