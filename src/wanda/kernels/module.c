/* The extension module wanda.kernels._native, on Python's stable ABI. Pointers come as integers; the typed wrappers
   beside this file check shapes and types. A further concern adds a NAME_methods table to its own file and a line here. */
#include <Python.h>

extern PyMethodDef columns_methods[], gram_methods[], packed_methods[], select_methods[];

static int add_methods(PyObject *module) {
    PyMethodDef *tables[] = {columns_methods, gram_methods, packed_methods, select_methods};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (PyModule_AddFunctions(module, tables[i])) return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)add_methods}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "C kernels; call them through the modules of wanda.kernels.", 0, NULL, slots,
    NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
