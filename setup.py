"""Builds minivllm._C: plain C by the C compiler, CUDA C by nvcc where there is one, linked by the C compiler.

`setup.py build_c` links the same objects, less Python's, with tests/c/ into stand-alone programs under build/c.
There CC may be a cross compiler: no file has flags of an architecture, since a kernel's source says what it may use
(csrc/cpu/simd/isa.h).

Environment: MINIVLLM_CUDA=auto|0|1, MINIVLLM_CUDA_ARCHS="80;90a", MINIVLLM_WERROR=1, MINIVLLM_LINEINFO=1 (for
profilers: CUDA code remembers its lines, and the path they were compiled under), CC, CFLAGS, NVCC, CUDA_HOME,
MINIVLLM_SANITIZE=address,undefined or =thread. A source file is compiled again when it, a header it includes, or its
command line changed.
"""

import fcntl
import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'#define MV_VERSION "(.+)"', (ROOT / "csrc/mv.h").read_text())[1]
BINDING_SOURCES = ["csrc/python/**/*.c"]
C_SOURCES = ["csrc/ops/*.c", "csrc/cpu/**/*.c"]
CUDA_SOURCES = ["csrc/cuda/**/*.cu"]
ALL_SOURCES = BINDING_SOURCES + C_SOURCES + CUDA_SOURCES

# sm_80 and its PTX run on everything from Ampere up; sm_90a is Hopper's own. tools/wheels.py has the list of a wheel.
DEFAULT_ARCHS = "80;90a"
OLDEST_CUDA = 12

C_FLAGS = """-std=c11 -O3 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -Icsrc
    -Wall -Wextra -Wpedantic -Wconversion"""
# No kernel may need much of a caller's stack, which can be a thread's of 64 kB. The sanitizers' frames are larger.
FRAME_FLAG = "-Wframe-larger-than=4096"
PATHS = {ROOT: ".", sysconfig.get_path("include"): "python"}  # what debug information calls them
HARDENING_FLAGS = ["-fstack-protector-strong", "-U_FORTIFY_SOURCE"]
HARDENING_FLAGS += [f"-ffile-prefix-map={path}={name}" for path, name in PATHS.items()]
HARDENED_LINK = "-Wl,-z,relro,-z,now"

# CPython's own flags have -fwrapv, which would hide every signed overflow.
SANITIZERS = os.environ.get("MINIVLLM_SANITIZE", "")
SANITIZE_FLAGS = ["-O1", "-g", "-UNDEBUG", "-fno-wrapv", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZERS}",
                  "-fno-sanitize-recover=undefined"]  # fmt: skip

# Launch stubs of the runtime hold function-local statics. The two -fno flags keep __cxa_guard_* and the unwinder out,
# so that the binary needs no libstdc++ (docs/decisions/0001).
CUDA_FLAGS = """-std=c++17 -O3 -Icsrc -Xfatbin=-compress-all
    -Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-threadsafe-statics,-Wall"""

# Free-threaded CPython has no stable ABI before 3.15: it gets an extension of its own.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


def flag(name):
    return os.environ.get(name, "0") not in ("", "0")


def sources(patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


@functools.cache
def fortify_flag(compiler):
    """The highest level of checks in memcpy and the like that this compiler and its C library know."""
    source = "#include <string.h>\nint main(void) { return 0; }"
    command = [*compiler, "-x", "c", "-O2", "-Werror", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3", "-c", "-"]
    known = subprocess.run([*command, "-o", os.devnull], input=source, text=True, capture_output=True).returncode == 0
    return f"-D_FORTIFY_SOURCE={3 if known else 2}"


def without_rpath(command):
    """A linker's command without the directories that CPython's own flags have it search at run time."""
    return [word for word in command if not re.match(r"-Wl,(-rpath|--rpath|-R)[,=]", word)]


def special_arch(source):
    """90a of *_sm90a.cu: the one architecture of that file; None of others."""
    found = re.search(r"_sm(\d+[af])\.cu$", source)
    return found[1] if found else None


class Cuda:
    """The toolkit, and what to build with it."""

    def __init__(self, nvcc):
        self.nvcc = nvcc
        self.release = re.search(r"release ([\d.]+)", self.ask("--version"))[1]
        self.library_dirs = re.findall(r'"-L([^"]+)"', self.ask("--dryrun", "-x", "cu", os.devnull))
        known = set(re.findall(r"sm_(\d+)", self.ask("--list-gpu-code")))
        wanted = re.split(r"[;,\s]+", os.environ.get("MINIVLLM_CUDA_ARCHS") or DEFAULT_ARCHS)
        self.archs = [arch for arch in wanted if arch.rstrip("af") in known]
        self.generic = [arch for arch in self.archs if arch.isdigit()]
        if not self.generic:
            raise SystemExit(
                f"minivllm: none of MINIVLLM_CUDA_ARCHS={';'.join(wanted)} is a plain architecture that "
                f"{nvcc} knows: at least one is needed, such as 80. It knows {sorted(known, key=int)}."
            )
        # PTX runs on its own architecture and on newer ones only. So it is that of the oldest one, but of 90 where that
        # is listed: what is older than that has machine code of its own.
        self.ptx = "90" if "90" in self.generic else min(self.generic, key=int)

    def ask(self, *arguments):
        return subprocess.run(
            [self.nvcc, *arguments], check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ).stdout

    @staticmethod
    def find():
        """nvcc by NVCC, CUDA_HOME, CUDA_PATH, PATH, then the usual place; None where there is none."""
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        candidates = [
            os.environ.get("NVCC"),
            *(f"{home}/bin/nvcc" for home in homes),
            "nvcc",
            "/usr/local/cuda/bin/nvcc",
        ]
        return next(filter(None, map(shutil.which, filter(None, candidates))), None)

    @staticmethod
    def wanted():
        choice = os.environ.get("MINIVLLM_CUDA", "auto")
        if choice not in ("auto", "0", "1"):
            raise SystemExit(f"minivllm: MINIVLLM_CUDA={choice}, expected auto, 0 or 1")
        if choice == "0":
            return None
        nvcc = Cuda.find()
        cuda = Cuda(nvcc) if nvcc else None
        why_not = Cuda.why_not(cuda)
        if why_not and choice == "1":
            raise SystemExit(f"minivllm: MINIVLLM_CUDA=1, but {why_not}")
        return None if why_not else cuda

    @staticmethod
    def why_not(cuda):
        if cuda is None:
            return "there is no nvcc in NVCC, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
        if int(cuda.release.split(".")[0]) < OLDEST_CUDA:
            return f"{cuda.nvcc} is of CUDA {cuda.release}, {OLDEST_CUDA}.0 is the oldest that knows sm_90a"
        return ""

    def names(self):
        """What the binary holds, such as "sm_80 compute_80 sm_90a"."""
        special = {special_arch(source) for source in sources(CUDA_SOURCES)} - {None, *self.archs}
        archs = [*self.archs, *sorted(special)]
        return " ".join(f"sm_{arch} compute_{arch}" if arch == self.ptx else f"sm_{arch}" for arch in archs)

    def gencode(self, source):
        """*_sm90a.cu is for that architecture alone; everything else is for all of them. Where a plain architecture
        and its special one are both asked for, generic code needs only the plain one."""
        special = special_arch(source)
        archs = [special] if special else [arch for arch in self.archs if arch[:-1] not in self.generic]
        for arch in archs:
            code = f"[sm_{arch},compute_{arch}]" if arch == self.ptx else f"sm_{arch}"
            yield f"-gencode=arch=compute_{arch},code={code}"

    def command(self, source):
        command = [self.nvcc, *CUDA_FLAGS.split(), *self.gencode(source)]
        command += [f"-Xcompiler={word}" for word in [*HARDENING_FLAGS, "-D_FORTIFY_SOURCE=2"]]
        command += ["-lineinfo"] * flag("MINIVLLM_LINEINFO")
        if source.endswith("/device.cu"):
            command.append(f'-DMV_CUDA_ARCHS="{self.names()}"')
        if flag("MINIVLLM_WERROR"):
            command += ["--Werror=all-warnings", "-Xcompiler=-Werror"]
        return command


class BuildExtension(build_ext):
    """Compiles what changed, in parallel, and links it."""

    def build_extension(self, extension):
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise SystemExit("minivllm: Python.h is missing: install the headers of this Python, such as python3-dev")
        target = self.get_ext_fullpath(extension.name)
        self.build(self.compiler.linker_so, {target: sources(BINDING_SOURCES)})

    def build(self, linker, targets):
        """Links each target from its own sources and those that all of them share."""
        os.chdir(ROOT)
        self.need_a_compiler(linker)
        cuda = Cuda.wanted()
        self.objects_dir = Path(self.build_temp, "minivllm")
        self.objects_dir.mkdir(parents=True, exist_ok=True)
        shared, own = sources(CUDA_SOURCES) if cuda else [], [path for paths in targets.values() for path in paths]
        shared += sources(C_SOURCES)  # after the slow ones
        self.total, self.started = len(shared + own), itertools.count(1)
        with open(self.objects_dir / "lock", "w") as lock:  # a second build of this tree waits here
            fcntl.flock(lock, fcntl.LOCK_EX)
            with ThreadPoolExecutor(self.parallel or len(os.sched_getaffinity(0))) as pool:
                objects = dict(
                    zip(shared + own, pool.map(lambda path: self.compile(path, cuda), shared + own), strict=True)
                )
            for target, paths in targets.items():
                self.link([*linker, *(objects[path] for path in shared + paths)], Path(target), cuda)
        built = f"with CUDA {cuda.release} for {cuda.names()}" if cuda else f"WITHOUT CUDA ({self.why_no_cuda()})"
        self.say(f"======== minivllm {VERSION}: built the CPU backend, {built} ========")

    def need_a_compiler(self, linker):
        for program in (self.compiler.compiler_so[0], linker[0]):
            if not shutil.which(program):
                raise SystemExit(
                    f"minivllm: the C compiler {program} was not found: install one, such as the package gcc (in "
                    "Debian and Ubuntu with libc6-dev), or name one in CC. A wheel of minivllm needs none."
                )

    @staticmethod
    def why_no_cuda():
        if os.environ.get("MINIVLLM_CUDA") == "0":
            return "MINIVLLM_CUDA=0"
        nvcc = Cuda.find()
        return Cuda.why_not(Cuda(nvcc) if nvcc else None)

    @staticmethod
    def say(line):
        print(line, file=sys.stderr, flush=True)

    def c_command(self, source, cuda):
        command = [*self.compiler.compiler_so, *C_FLAGS.split()]
        if source.startswith("csrc/python/"):
            command += [f"-isystem{path}" for path in self.include_dirs]
            command += ["-DPy_LIMITED_API=0x030B0000"] * LIMITED_API
        command += ["-DMV_WITH_CUDA=1"] * bool(cuda)
        command += ["-Werror"] * flag("MINIVLLM_WERROR")
        if flag("MINIVLLM_SANITIZE"):
            return command + SANITIZE_FLAGS
        command += [FRAME_FLAG] * source.startswith(("csrc/ops/", "csrc/cpu/"))
        return [*command, *HARDENING_FLAGS, fortify_flag(tuple(self.compiler.compiler_so[:1]))]

    def compile(self, source, cuda):
        """Object file of one source; the stamp beside it holds the command that made it, and is written last."""
        target = self.objects_dir / (source.replace("/", ".") + ".o")
        depfile, stamp = target.with_suffix(".d"), target.with_suffix(".command")
        command = cuda.command(source) if source.endswith(".cu") else self.c_command(source, cuda)
        command += ["-MMD", "-MF", str(depfile), "-c", source, "-o", str(target)]
        line = shlex.join(command)
        number = next(self.started)
        if self.is_current(target, depfile, stamp, line):
            return str(target)
        stamp.unlink(missing_ok=True)
        started = time.time_ns()
        self.say(f"[{number}/{self.total}] {os.path.basename(command[0])} {source}")
        run = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if run.returncode:
            raise SystemExit(f"{line}\n{run.stdout}minivllm: {source} does not compile")
        if run.stdout:
            self.say(run.stdout.rstrip())
        os.utime(target, ns=(started, started))  # an edit made meanwhile is newer
        stamp.write_text(line)
        return str(target)

    @staticmethod
    def is_current(target, depfile, stamp, line):
        if not (target.exists() and depfile.exists() and stamp.exists()) or stamp.read_text() != line:
            return False
        inputs = re.sub(r"^.*?:\s", "", depfile.read_text().replace("\\\n", " "), count=1).split()
        built = target.stat().st_mtime_ns
        return all(os.path.exists(path) and os.stat(path).st_mtime_ns <= built for path in inputs)

    def link(self, command, target, cuda):
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*without_rpath(command), HARDENED_LINK, *SANITIZE_FLAGS * flag("MINIVLLM_SANITIZE")]
        if cuda:
            command += [f"-L{path}" for path in cuda.library_dirs]
            command += ["-lcudart_static", "-lrt"]
        if target.suffix == ".so":
            command.append("-Wl,--version-script=csrc/python/exports.map")
        fresh = target.with_name(f"{target.name}.new")
        environment = {name: value for name, value in os.environ.items() if name != "LD_RUN_PATH"}
        subprocess.run([*command, "-ldl", "-lpthread", "-lm", "-o", str(fresh)], check=True, env=environment)
        os.replace(fresh, target)  # a process that has the old one mapped keeps it


class BuildC(BuildExtension):
    description = "build the stand-alone C programs of tests/c"
    user_options = [*build_ext.user_options, ("build-programs=", None, "directory of the programs (build/c)")]

    def initialize_options(self):
        super().initialize_options()
        self.build_programs = "build/c"

    def build_extensions(self):
        programs = {f"{self.build_programs}/{Path(path).stem}": [path] for path in sources(["tests/c/*.c"])}
        self.build(self.compiler.linker_exe, programs)


def long_description():
    """README.md as a package index shows it, which knows neither the files nor the pictures beside it."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]+\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^]]+)\]\((?!https?:|#)([^)]+)\)", r"\1 (`\2`)", text)


setup(
    version=VERSION,
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    ext_modules=[Extension("minivllm._C", sources(ALL_SOURCES), py_limited_api=LIMITED_API)],
    cmdclass={"build_ext": BuildExtension, "build_c": BuildC},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED_API else {},
)
