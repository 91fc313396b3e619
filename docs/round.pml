/*
 * The commit of one epoch (collectives/agreement), for spin:
 *
 *   spin -a docs/round.pml && cc -O2 -DSAFETY -DCOLLAPSE -w -o pan pan.c && ./pan -E -m100000
 *
 * Three acceptors, of which 0 is the best-ranked, and two coordinators: acceptor 0 with ballot 0, which needs no
 * promises, and acceptor 1 with ballot 3. Any message may be lost, and channels are slow. CRASHES times (1) an acceptor
 * crashes, and comes back with its journal (promise and vote) and without the bytes it held. It leaves out gathering, reducing (a
 * coordinator has a result of its own, and holders hand it on), resignations and joiners.
 *
 * Checked: two coordinators never decide two values; a decision is in the journal of its coordinator before it is told.
 * -DFORGETFUL loses the journal in the crash, -DEAGER passes over bytes that are lost without everybody's answer,
 * -DDEAF ignores the votes found, -DSTUBBORN (with -DCRASHES=2) counts votes after a higher promise: each of them forks.
 * -E: a run may end with somebody waiting, for nothing is ever sent again here.
 */

#ifndef CRASHES
#define CRASHES 1
#endif
#define N 3
#define NOBODY 255
#define NONE 0            /* no ballot yet: 1 is ballot 0, 3 the higher one */
#define LOW 1
#define HIGH 3

mtype = { prepare, promise, accept, voted, commit };

/* to each acceptor and to each coordinator: kind, from, ballot, ballot of the vote told, value, held, decided */
chan toacc[N] = [3] of { mtype, byte, byte };
chan tocoo[2] = [4] of { mtype, byte, byte, byte, bool };

byte promised[N];         /* on disk */
byte vballot[N];          /* on disk: the ballot of the last vote */
byte vvalue[N];           /* on disk: its value */
bool holdlow[N];          /* in memory: the bytes of value LOW */
bool holdhigh[N];
byte decided[N];          /* on disk: the value decided, as known here */
byte proposed[4];         /* what each ballot proposes; 0: nothing yet */
byte crashes;
byte told;                /* the first value anybody was told to be decided */

#define holds(i, v) ((v == LOW && holdlow[i]) || (v == HIGH && holdhigh[i]))

inline hold(i, v) {
    if
    :: v == LOW -> holdlow[i] = true
    :: v == HIGH -> holdhigh[i] = true
    fi
}

inline tell(v) {
    assert(told == 0 || told == v);
    told = v
}

inline somebody_holds(v, yes) {
    yes = holds(0, v) || holds(1, v) || holds(2, v)
}

proctype Acceptor(byte me) {
    mtype kind; byte ballot, v; bool yes;
end:
    do
    :: atomic { toacc[me] ? kind, ballot, v ->
        if
        :: kind == prepare && decided[me] == 0 && ballot >= promised[me] ->
            promised[me] = ballot;
            if
            :: vballot[me] == NONE -> tocoo[ballot / 2] ! promise, me, NONE, 0, false
            :: else -> tocoo[ballot / 2] ! promise, me, vballot[me], vvalue[me], holds(me, vvalue[me])
            fi
        :: kind == prepare && decided[me] != 0 ->
            tocoo[ballot / 2] ! commit, me, 0, decided[me], false
        :: kind == accept && decided[me] == 0 && ballot >= promised[me] ->
            somebody_holds(v, yes);     /* what it lacks it fetches, if it still can */
            if
            :: yes ->
                hold(me, v);
                promised[me] = ballot; vballot[me] = ballot; vvalue[me] = v;
                tocoo[ballot / 2] ! voted, me, ballot, v, true
            :: else
            fi
        :: kind == accept && decided[me] != 0 ->
            tocoo[ballot / 2] ! commit, me, 0, decided[me], false
        :: kind == commit -> decided[me] = v
        :: else
        fi; yes = false; kind = 0; ballot = 0; v = 0 }
    :: atomic { nempty(toacc[me]) -> toacc[me] ? kind, ballot, v; kind = 0; ballot = 0; v = 0 }     /* lost */
    :: atomic { crashes < CRASHES ->
        crashes++; holdlow[me] = false; holdhigh[me] = false;
#ifdef FORGETFUL
        promised[me] = NONE; vballot[me] = NONE; vvalue[me] = 0; decided[me] = 0
#endif
        }
    od
}

/* A quorum of three: two of them. */
#define two(a) (a[0] + a[1] + a[2] >= 2)
#define all(a) (a[0] + a[1] + a[2] == 3)

#ifdef STUBBORN
#define may_count true
#else
#define may_count (promised[me] <= ballot)
#endif

proctype Coordinator(byte which; byte me; byte ballot) {
    bit answered[N]; bit votes[N];
    byte found = NONE, value = 0, unheld = NONE, from, vb, v, i;
    bool held, yes; mtype kind;

    if
    :: ballot == LOW -> goto propose
    :: else
    fi;

    atomic { promised[me] <= ballot && decided[me] == 0 ->
        for (i : 0 .. N - 1) { toacc[i] ! prepare, ballot, 0 } i = 0 }
preparing:
    do
    :: atomic { tocoo[which] ? kind, from, vb, v, held ->
        if
        :: kind == promise ->
            answered[from] = 1;
            if
            :: vb > found && held -> found = vb; value = v
            :: vb > unheld && !held -> unheld = vb
            :: else
            fi
        :: kind == commit -> decided[me] = v; tell(v); goto over
        :: else
        fi; vb = 0; v = 0; held = false; from = 0; kind = 0 }
    :: atomic { nempty(tocoo[which]) -> tocoo[which] ? kind, from, vb, v, held; kind = 0; vb = 0; v = 0; held = false; from = 0 }
#ifdef EAGER
    :: two(answered) -> break
#else
    :: two(answered) && (unheld <= found || all(answered)) -> break
#endif
    :: timeout -> goto over
    od;

propose:
    atomic {
        if
        :: decided[me] != 0 || promised[me] > ballot -> goto over
        :: else
        fi;
        if
#ifndef DEAF
        :: found != NONE -> skip
#endif
#ifdef DEAF
        :: true -> value = ballot; hold(me, value)
#else
        :: found == NONE -> value = ballot; hold(me, value)     /* its own reduction */
#endif
        fi;
        proposed[ballot] = value;
        for (i : 0 .. N - 1) { toacc[i] ! accept, ballot, value } i = 0 }
    do
    :: atomic { tocoo[which] ? kind, from, vb, v, held ->
        if
        :: kind == voted && vb == ballot && may_count -> votes[from] = 1
        :: kind == commit -> decided[me] = v; tell(v); goto over
        :: else
        fi; vb = 0; v = 0; held = false; from = 0; kind = 0 }
    :: atomic { two(votes) && may_count ->
        assert(decided[me] == 0 || decided[me] == value);
        decided[me] = value; tell(value);
        for (i : 0 .. N - 1) { if :: nfull(toacc[i]) -> toacc[i] ! commit, 0, value :: true fi } i = 0;
        goto over }
    :: !may_count -> goto over
    :: timeout -> goto over
    od;
over:
    skip
}

init {
    atomic {
        run Acceptor(0); run Acceptor(1); run Acceptor(2);
        run Coordinator(0, 0, LOW); run Coordinator(1, 1, HIGH)
    }
}
