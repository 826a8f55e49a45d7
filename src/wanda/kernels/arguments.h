/* Integers from Python, as every function of the extension takes them: sizes, and addresses of memory. */
#ifndef WANDA_ARGUMENTS_H
#define WANDA_ARGUMENTS_H

#include <Python.h>

#include "parallel.h"

enum { MOST_ARGUMENTS = 20 };

#define POOL(address) ((gomp_parallel)(intptr_t)(address))

/* Reads `count` integers; 0 after an exception. */
static inline int integers(PyObject *const *arguments, Py_ssize_t given, int count, int64_t *out) {
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "expected %d integers, got %zd", count, given);
        return 0;
    }
    for (int i = 0; i < count; i++) {
        out[i] = PyLong_AsLongLong(arguments[i]);
        if (out[i] == -1 && PyErr_Occurred()) return 0;
    }
    return 1;
}

#endif
