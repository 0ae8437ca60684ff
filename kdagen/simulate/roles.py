"""Compiles a PrimFunc after warp specialisation: which threads run what, and what they wait for.

Threads that no branch tells apart form one role. program.py's Compiler does the rest.
"""

from __future__ import annotations

from kdagen.build import adapter
from kdagen.simulate.asynchronous import ASYNCHRONOUS_OPERATIONS, LATE, Barrier, Wait, retire
from kdagen.simulate.expressions import short_name
from kdagen.simulate.memory import Handle
from kdagen.simulate.program import Compiler

# threadIdx.x < n: the first thread beyond the branch is n plus this, and whether the branch lies below it
ROLE_TESTS = {"LT": (0, True), "LE": (1, True), "GE": (0, False), "GT": (1, False)}
READS = 1  # bit of T.region's access argument


class RaceCompiler(Compiler):
    """Compiles the program after warp specialisation; each statement ends with a point where others may run."""

    def __init__(self, name: str, tf32: bool):
        super().__init__(name, tf32)
        self.thread = None  # variable of threadIdx.x
        self.threads = 1
        self.cuts = set()  # threads at which a branch begins
        self.zero = []  # variables of threadIdx.y and z

    @staticmethod
    def leaf(run):
        def step(f):
            run(f)
            yield

        return step

    def _s_AttrStmt(self, s):
        if str(s.attr_key) == "thread_extent":
            self._launch(str(s.node.thread_tag), s.node.var, s.value)
        return self.statement(s.body)

    def _launch(self, tag: str, var, extent):
        if tag.startswith("blockIdx"):
            self.grid.append((var, self.expression(extent)))
        elif tag == "threadIdx.x":
            self.thread, self.threads = var, int(extent)
        else:
            self.zero.append(var)

    @property
    def roles(self) -> list[tuple[int, int]]:
        cuts = [0, *sorted(c for c in self.cuts if 0 < c < self.threads), self.threads]
        return list(zip(cuts, cuts[1:], strict=False))

    def expression(self, e):
        if test := self.role_test(e):
            cut, below = test
            self.cuts.add(cut)
            return lambda f: (f.first < cut) == below
        if self._is_thread(e):
            raise self.unsupported("use of threadIdx.x other than 'threadIdx.x < constant'", e)
        return super().expression(e)

    def role_test(self, e) -> tuple[int, bool] | None:
        """(n, below) where `e` asks whether threadIdx.x is below n (or not below it)."""
        kind = type(e).__name__
        if kind not in ROLE_TESTS or not self._is_thread(e.a) or type(e.b).__name__ != "IntImm":
            return None
        beyond, below = ROLE_TESTS[kind]
        return int(e.b) + beyond, below

    def _is_thread(self, e) -> bool:
        return self.thread is not None and type(e).__name__ == "Var" and e.same_as(self.thread)

    def allocation(self, buffer, annotations):
        handle = Handle(buffer)
        if handle.scope != "shared.barrier":
            return super().allocation(buffer, annotations)
        counts = [int(n) for n in annotations["barrier_init"][buffer.data]]
        names = [f"barrier {handle.name}[{i}]" for i in range(len(counts))]
        return lambda f: f.shared.setdefault(handle.data, [Barrier(*b) for b in zip(names, counts, strict=True)])

    def barrier(self, load):
        data, index = load.buffer.data, self.indices(load.indices)
        return lambda f: f.shared[data][index(f)[0]]

    def operation(self, name: str, call):
        if name == "mbarrier_wait_parity":
            return self._wait_barrier(call)
        if name == "wait_wgmma":
            return self._wait_wgmma(call)
        if name == "tvm_storage_sync":
            return self.leaf(self._sync_block(call))
        if name in ASYNCHRONOUS_OPERATIONS:
            return self.leaf(ASYNCHRONOUS_OPERATIONS[name](self, call))
        raise self.unsupported(f"operation {call.op.name} in a warp-specialised program", call)

    def _sync_block(self, call):
        refusal = self.unsupported("T.sync_threads between warp roles", call)

        def sync(f):
            if len(self.roles) > 1:
                raise refusal

        return sync

    def _wait_barrier(self, call):
        barrier, parity = self.barrier(call.args[0]), self.expression(call.args[1])

        def wait(f):
            yield Wait(barrier(f), int(parity(f)) & 1)

        return wait

    def _wait_wgmma(self, call):
        left = self.expression(call.args[0])

        def wait(f):
            yield LATE
            while len(f.flights) > left(f):
                retire(f)

        return wait


def misplaced_fragments(body, role_test) -> list[str]:
    """Fragments that one role holds in its registers and that code common to all roles reads.

    A fragment's layout covers its role's threads alone; the others would store what their registers happen to hold.
    """
    in_roles, common = set(), {}

    def walk(s, in_role: bool):
        kind = type(s).__name__
        if kind == "SeqStmt":
            for part in s.seq:
                walk(part, in_role)
        elif kind == "IfThenElse":
            branches = [s.then_case] + ([s.else_case] if s.else_case is not None else [])
            for branch in branches:
                walk(branch, in_role or bool(role_test(s.condition)))
        elif kind == "SBlockRealize":
            walk(s.block, in_role)
        elif hasattr(s, "body"):
            walk(s.body, in_role)
        else:
            used, read = fragments(s)
            if in_role:
                in_roles.update(used)
            else:
                common.update(read)

    walk(body, False)
    return [name for data, name in common.items() if data in in_roles]


def fragments(statement) -> tuple[dict, dict]:
    """Names, by data variable, of the fragments that a statement touches, and of those that it reads."""
    loads = adapter.nodes(statement, lambda n: type(n).__name__ == "BufferLoad")
    written = [r.args[0] for r in adapter.nodes(statement, _is_written_region)]
    read = {n.buffer.data: n.buffer.name for n in loads if n not in written and _is_fragment(n.buffer)}
    used = {n.buffer.data: n.buffer.name for n in loads if _is_fragment(n.buffer)}
    if type(statement).__name__ == "BufferStore" and _is_fragment(statement.buffer):
        used[statement.buffer.data] = statement.buffer.name
    return used, read


def _is_written_region(node) -> bool:
    return type(node).__name__ == "Call" and short_name(node) == "region" and not int(node.args[1]) & READS


def _is_fragment(buffer) -> bool:
    return str(buffer.scope()) == "local.fragment"
