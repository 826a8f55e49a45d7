/* Python's view of gram.h. */
#include "arguments.h"
#include "gram.h"

/* tokens rows columns | a stride b stride out stride | upper level threads pool */
static PyObject *add_product(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    int64_t a[MOST_ARGUMENTS];
    (void)self;
    if (!integers(arguments, given, 13, a)) return NULL;
    const token_product p = {.tokens = a[0],
                             .rows = a[1],
                             .columns = a[2],
                             .a = (const void *)(intptr_t)a[3],
                             .a_stride = a[4],
                             .b = (const void *)(intptr_t)a[5],
                             .b_stride = a[6],
                             .out = (void *)(intptr_t)a[7],
                             .out_stride = a[8],
                             .upper = (int)a[9]};
    int failed;
    Py_BEGIN_ALLOW_THREADS;
    failed = add_token_product(&p, (int)a[10], (int)a[11], POOL(a[12]));
    Py_END_ALLOW_THREADS;
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyMethodDef gram_methods[] = {
    {"add_token_product", (PyCFunction)(void (*)(void))add_product, METH_FASTCALL, "out += a^T b, bfloat16 tokens."},
    {NULL, NULL, 0, NULL}};
