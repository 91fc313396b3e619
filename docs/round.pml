/*
 * The commit of one epoch (collectives/agreement), for spin:
 *
 *   spin -a docs/round.pml && cc -O2 -DSAFETY -DCOLLAPSE -w -o pan pan.c && ./pan -E -m100000
 *
 * Three acceptors, of which 0 is the best-ranked, and two coordinators: acceptor 0 with ballot 0, which needs no
 * promises, and acceptor 1 with ballot 3. -DTHREE adds acceptor 2 with ballot 5, which is too much to be searched whole
 * (-DBITSTATE samples it). Any message may be lost, and channels are slow. CRASHES times (1) an acceptor crashes, and
 * comes back with its journal (promise and vote) and without the bytes it held. A coordinator whose promises show a
 * value that all its tellers (the owners of the ballots it was proposed in) say nothing is decided of may pass it over,
 * whether its bytes are lost or not. The model leaves out gathering, reducing (a coordinator has a result of its own,
 * and holders hand it on), resignations, joiners.
 *
 * Checked: two coordinators never decide two values; a decision is in the journal of its coordinator before it is told.
 * -DFORGETFUL loses the journal in the crash, -DEAGER passes over bytes that are lost without their tellers' answers,
 * -DDEAF ignores the votes found, -DSTUBBORN counts votes after a higher promise: each of them forks.
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
#define TOP 5
#ifdef THREE
#define COORDINATORS 3
#else
#define COORDINATORS 2
#endif

mtype = { prepare, promise, accept, voted, commit };

/* to acceptors: kind, ballot, value, tellers; to coordinators: kind, from, ballot (of the vote told), value, tellers, held */
chan toacc[N] = [3] of { mtype, byte, byte, byte };
chan tocoo[COORDINATORS] = [4] of { mtype, byte, byte, byte, byte, bool };

byte promised[N];         /* on disk */
byte vballot[N];          /* on disk: the ballot of the last vote */
byte vvalue[N];           /* on disk: its value */
byte vtellers[N];         /* on disk: a bit for each of its tellers */
bool holdlow[N];          /* in memory: the bytes of value LOW */
bool holdhigh[N];
bool holdtop[N];
byte decided[N];          /* on disk: the value decided, as known here */
byte crashes;
byte told;                /* the first value anybody was told to be decided */

#define holds(i, v) ((v == LOW && holdlow[i]) || (v == HIGH && holdhigh[i]) || (v == TOP && holdtop[i]))

inline hold(i, v) {
    if
    :: v == LOW -> holdlow[i] = true
    :: v == HIGH -> holdhigh[i] = true
    :: v == TOP -> holdtop[i] = true
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
    mtype kind; byte ballot, v, t; bool yes;
end:
    do
    :: atomic { toacc[me] ? kind, ballot, v, t ->
        if
        :: kind == prepare && decided[me] == 0 && ballot >= promised[me] ->
            promised[me] = ballot;
            if
            :: vballot[me] == NONE -> tocoo[ballot / 2] ! promise, me, NONE, 0, 0, false
            :: else -> tocoo[ballot / 2] ! promise, me, vballot[me], vvalue[me], vtellers[me], holds(me, vvalue[me])
            fi
        :: kind == prepare && decided[me] != 0 ->
            tocoo[ballot / 2] ! commit, me, 0, decided[me], 0, false
        :: kind == accept && decided[me] == 0 && ballot >= promised[me] ->
            somebody_holds(v, yes);     /* what it lacks it fetches, if it still can */
            if
            :: yes ->
                hold(me, v);
                promised[me] = ballot; vballot[me] = ballot; vvalue[me] = v; vtellers[me] = t;
                tocoo[ballot / 2] ! voted, me, ballot, v, 0, true
            :: else
            fi
        :: kind == accept && decided[me] != 0 ->
            tocoo[ballot / 2] ! commit, me, 0, decided[me], 0, false
        :: kind == commit -> decided[me] = v
        :: else
        fi; yes = false; kind = 0; ballot = 0; v = 0; t = 0 }
    :: atomic { nempty(toacc[me]) -> toacc[me] ? kind, ballot, v, t; kind = 0; ballot = 0; v = 0; t = 0 }     /* lost */
    :: atomic { crashes < CRASHES ->
        crashes++; holdlow[me] = false; holdhigh[me] = false; holdtop[me] = false;
#ifdef FORGETFUL
        promised[me] = NONE; vballot[me] = NONE; vvalue[me] = 0; vtellers[me] = 0; decided[me] = 0
#endif
        }
    od
}

/* A quorum of three: two of them. */
#define two(a) (((a) & 1) + (((a) >> 1) & 1) + ((a) >> 2) >= 2)
#define over ((tellers & answered) == tellers)

#ifdef STUBBORN
#define may_count true
#else
#define may_count (promised[me] <= ballot)
#endif

proctype Coordinator(byte which; byte me; byte ballot) {
    byte answered, votes;                               /* a bit for each acceptor */
    byte found = NONE, value = 0, tellers = 0, from, vb, v, t, i;
    bool held, bytes; mtype kind;

    if
    :: ballot == LOW -> goto propose
    :: else
    fi;

    atomic { promised[me] <= ballot && decided[me] == 0 ->
        for (i : 0 .. N - 1) { toacc[i] ! prepare, ballot, 0, 0 } i = 0 }
    do
    :: atomic { tocoo[which] ? kind, from, vb, v, t, held ->
        if
        :: kind == promise ->
            answered = answered | (1 << from);
            if
            :: vb > found -> found = vb; value = v; tellers = t; bytes = held
            :: vb == found && vb > NONE && held -> bytes = true
            :: else
            fi
        :: kind == commit -> decided[me] = v; tell(v); goto done
        :: else
        fi; vb = 0; v = 0; t = 0; held = false; from = 0; kind = 0 }
    :: atomic { nempty(tocoo[which]) ->
        tocoo[which] ? kind, from, vb, v, t, held; kind = 0; vb = 0; v = 0; t = 0; held = false; from = 0 }
#ifdef EAGER
    :: atomic { two(answered) -> if :: found != NONE && !bytes -> found = NONE :: else fi; break }
#else
    :: atomic { two(answered) && (found == NONE || bytes) -> break }
    :: atomic { two(answered) && over -> found = NONE; break }
#endif
    :: timeout -> goto done
    od;

propose:
    atomic {
        if
        :: decided[me] != 0 || promised[me] > ballot -> goto done
        :: else
        fi;
        if
#ifdef DEAF
        :: true -> value = ballot; hold(me, value); tellers = 0
#else
        :: found != NONE -> skip
        :: found == NONE -> value = ballot; hold(me, value); tellers = 0     /* its own reduction */
#endif
        fi;
        tellers = tellers | (1 << me); answered = 0; found = NONE; bytes = false;
        for (i : 0 .. N - 1) { toacc[i] ! accept, ballot, value, tellers } i = 0; tellers = 0 }
    do
    :: atomic { tocoo[which] ? kind, from, vb, v, t, held ->
        if
        :: kind == voted && vb == ballot && may_count -> votes = votes | (1 << from)
        :: kind == commit -> decided[me] = v; tell(v); goto done
        :: else
        fi; vb = 0; v = 0; t = 0; held = false; from = 0; kind = 0 }
    :: atomic { two(votes) && may_count ->
        assert(decided[me] == 0 || decided[me] == value);
        decided[me] = value; tell(value);
        for (i : 0 .. N - 1) { if :: nfull(toacc[i]) -> toacc[i] ! commit, 0, value, 0 :: true fi } i = 0;
        goto done }
    :: !may_count -> goto done
    :: timeout -> goto done
    od;
done:
    atomic { votes = 0; answered = 0; found = NONE; value = 0; tellers = 0; bytes = false; i = 0; vb = 0; v = 0; t = 0;
        held = false; from = 0; kind = 0 }
}

init {
    atomic {
        run Acceptor(0); run Acceptor(1); run Acceptor(2);
#ifdef THREE
        run Coordinator(2, 2, TOP);
#endif
        run Coordinator(0, 0, LOW); run Coordinator(1, 1, HIGH)
    }
}
