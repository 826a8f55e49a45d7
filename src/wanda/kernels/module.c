/* The extension module wanda.kernels._native, on Python's stable ABI. Pointers come as integers; the typed wrappers
   beside this file check shapes and types. A further concern adds a NAME_methods table to its own file and a line here. */
#include <Python.h>

extern PyMethodDef gram_methods[], packed_methods[];

static int add_methods(PyObject *module) {
    if (PyModule_AddFunctions(module, gram_methods)) return -1;
    return PyModule_AddFunctions(module, packed_methods);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)add_methods}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "C kernels; call them through the modules of wanda.kernels.", 0, NULL, slots,
    NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
