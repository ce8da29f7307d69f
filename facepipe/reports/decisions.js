"use strict";
// The decisions of one report: kept, undone, counted, and written as the file that `facepipe apply` takes. An act is what
// one key decides: an id, a time, and rows. Nothing here touches the page.

const facepipeIsAct = (act) =>
  typeof act?.id === "string" && Number.isFinite(act.at) && Array.isArray(act.rows)
  && act.rows.every((row) => typeof row?.decision === "string" && Array.isArray(row.faces));

// Acts in the storage of the browser. Each has an entry of its own, so that two tabs never overwrite each other's.
const facepipeBrowserStorage = (target) => {
  const prefix = JSON.stringify(["facepipe", target.gallery, target.report, target.table_version]) + "|";
  const state = { isKept: true, isFull: false };

  function read(text) {
    try {
      const act = JSON.parse(text);
      return facepipeIsAct(act) ? [act] : [];
    } catch {
      return []; // an entry that somebody else wrote
    }
  }

  return {
    state,
    load() {
      const acts = [];
      try {
        for (let n = 0; n < localStorage.length; n += 1) {
          const key = localStorage.key(n);
          if (key.startsWith(prefix)) acts.push(...read(localStorage.getItem(key)));
        }
        // A browser may have a storage that cannot be written.
        localStorage.setItem("facepipe-probe", "1");
        localStorage.removeItem("facepipe-probe");
      } catch {
        state.isKept = false;
      }
      return acts;
    },
    put(act) {
      if (!state.isKept) return;
      try {
        localStorage.setItem(prefix + act.id, JSON.stringify(act));
      } catch {
        state.isFull = true;
      }
    },
    remove(act) {
      try {
        localStorage.removeItem(prefix + act.id);
      } catch {
        // Without storage there is nothing to remove.
      }
    },
    // Tell what other tabs keep and remove.
    listen(onPut, onRemove) {
      addEventListener("storage", (event) => {
        if (event.storageArea !== localStorage || !event.key?.startsWith(prefix)) return;
        if (event.newValue === null) onRemove(event.key.slice(prefix.length));
        else read(event.newValue).forEach(onPut);
      });
    },
  };
};

// Acts that go straight into the gallery, through the server that served this page.
const facepipeServerStorage = (server, onError, onReplace) => {
  async function post(path, act) {
    const response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(act),
      credentials: "omit",
    });
    const answer = await response.text();
    if (!response.ok) throw new Error(answer.slice(0, 300));
    const { replaced } = JSON.parse(answer);
    if (replaced) onReplace(replaced);
  }
  // Acts are sent one after the other, so that an undo never overtakes what it undoes.
  let queue = Promise.resolve();
  const send = (path, act, onFailure) => {
    queue = queue.then(() => post(path, act)).catch((error) => {
      onFailure();
      onError(error.message || "the server does not answer");
    });
  };
  let drop = () => {};
  let restore = () => {};
  return {
    state: { isKept: true, isFull: false },
    load: () => server.acts.filter(facepipeIsAct),
    put: (act) => send("decide", act, () => drop(act.id)),
    remove: (act) => send("undo", { id: act.id }, () => restore(act)),
    listen(onPut, onRemove) {
      restore = onPut;
      drop = onRemove;
    },
  };
};

const facepipeDecisions = (target, storage) => {
  const tab = Math.floor(Math.random() * 2 ** 40).toString(36);
  const acts = new Map();
  let mine = [];
  let undone = [];
  let last = 0;
  let effective = null;
  const listeners = [];

  // Two rows that answer the same question replace each other. Rows with different questions stand side by side.
  function question(row, face) {
    if (row.other) return "pair " + (face < row.other ? face + " " + row.other : row.other + " " + face);
    if (row.decision === "keep") return "keep " + face;
    if (row.decision === "is_not") return "not " + face + " " + row.person;
    return "face " + face;
  }

  function changed() {
    effective = null;
    for (const listener of listeners) listener();
  }

  const inOrder = () => [...acts.values()].sort((a, b) => a.at - b.at || (a.id < b.id ? -1 : 1));

  function add(act) {
    acts.set(act.id, act);
    last = Math.max(last, act.at);
    effective = null;
  }

  function put(act) {
    add(act);
    mine.push(act.id);
    storage.put(act);
    changed();
  }

  function remove(id) {
    const act = acts.get(id);
    acts.delete(id);
    storage.remove(act);
    changed();
    return act;
  }

  // What holds now: of each group its last answer, and of each question its last row.
  function compute() {
    const answers = new Map();
    for (const act of inOrder()) if (act.group) answers.set(act.group, act);
    const rows = new Map();
    for (const act of inOrder()) {
      if (act.group && answers.get(act.group) !== act) continue;
      for (const row of act.rows) {
        for (const face of row.faces) {
          const asked = question(row, face);
          // A name that is given takes back that it was denied, and the other way round.
          if (row.decision === "is") rows.delete("not " + face + " " + row.person);
          const held = rows.get("face " + face);
          if (row.decision === "is_not" && held?.decision === "is" && held.person === row.person) rows.delete("face " + face);
          rows.delete(asked);
          rows.set(asked, { decision: row.decision, face, other: row.other, person: row.person, at: act.at, why: act.why });
        }
      }
    }
    const byFace = new Map();
    for (const row of rows.values()) {
      for (const face of row.other ? [row.face, row.other] : [row.face]) {
        if (!byFace.has(face)) byFace.set(face, []);
        byFace.get(face).push(row);
      }
    }
    effective = { answers, rows: [...rows.values()], byFace };
    return effective;
  }

  const current = () => effective || compute();

  storage.load().forEach(add);
  // An act that cannot be undone from here has no id of its own.
  mine = inOrder().filter((act) => act.id).map((act) => act.id);
  storage.listen(
    (act) => {
      add(act);
      changed();
    },
    (id) => {
      acts.delete(id);
      changed();
    },
  );
  return {
    onChange: (listener) => listeners.push(listener),
    storage: storage.state,
    get canUndo() {
      return mine.some((id) => acts.has(id));
    },
    get canRedo() {
      return undone.length > 0;
    },
    get rows() {
      return current().rows;
    },
    answer: (group) => current().answers.get(group),
    ofFace: (face) => current().byFace.get(face) || [],

    decide({ group = "", key = "", rows, why = "" }) {
      // The time rises with each act, whatever the clock does.
      last = Math.max(Date.now(), last + 1);
      const act = { id: last.toString(36) + "-" + tab, at: last, group, key, rows, why };
      undone = [];
      put(act);
      return act;
    },

    undo() {
      while (mine.length) {
        const id = mine.pop();
        if (!acts.has(id)) continue;
        const act = remove(id);
        undone.push(act);
        return act;
      }
      return null;
    },

    redo() {
      const act = undone.pop();
      if (act) put(act);
      return act || null;
    },

    forget() {
      for (const id of [...acts.keys()]) remove(id);
      mine = [];
      undone = [];
    },

    // The file: a header line, then one decision per line, in the order in which they were made.
    write(who) {
      const header = { facepipe_decisions: 1, gallery: target.gallery, report: target.report, table_version: target.table_version };
      const lines = [...current().rows].sort((a, b) => a.at - b.at).map((row) => {
        const line = { decision: row.decision, face_id: row.face };
        if (row.other) line.other_face_id = row.other;
        if (row.person) line.person = row.person;
        if (who) line.who = who;
        line.when = new Date(row.at).toISOString();
        if (row.why) line.why = row.why;
        return line;
      });
      return [header, ...lines].map((line) => JSON.stringify(line)).join("\n") + "\n";
    },
  };
};

// How right suggestions are, learnt from those that were decided: a logistic curve over the estimated probability. It
// starts from the estimate, which counts as a few decisions, so that the first answers do not overturn it.
const facepipeCalibration = (decided) => {
  const logit = (p) => Math.log(Math.min(0.999, Math.max(0.001, p)) / (1 - Math.min(0.999, Math.max(0.001, p))));
  const sigmoid = (x) => 1 / (1 + Math.exp(-Math.min(30, Math.max(-30, x))));
  const OFFSET_PRECISION = 0.25; // of the prior around offset 0
  const SLOPE_PRECISION = 4; // of the prior around slope 1
  let offset = 0;
  let slope = 1;
  for (let step = 0; step < 25; step += 1) {
    // One Newton step on the log posterior.
    let g0 = -OFFSET_PRECISION * offset;
    let g1 = -SLOPE_PRECISION * (slope - 1);
    let h00 = OFFSET_PRECISION;
    let h01 = 0;
    let h11 = SLOPE_PRECISION;
    for (const { probability, agrees } of decided) {
      const x = logit(probability);
      const p = sigmoid(offset + slope * x);
      const weight = Math.max(1e-6, p * (1 - p));
      g0 += (agrees ? 1 : 0) - p;
      g1 += ((agrees ? 1 : 0) - p) * x;
      h00 += weight;
      h01 += weight * x;
      h11 += weight * x * x;
    }
    const determinant = h00 * h11 - h01 * h01;
    const move0 = (h11 * g0 - h01 * g1) / determinant;
    const move1 = (h00 * g1 - h01 * g0) / determinant;
    offset += Math.min(1, Math.max(-1, move0));
    slope += Math.min(1, Math.max(-1, move1));
    if (Math.abs(move0) + Math.abs(move1) < 1e-6) break;
  }
  // A curve that falls would turn the ranking over: a few odd answers must not.
  slope = Math.max(0.05, slope);
  return (probability) => sigmoid(offset + slope * logit(probability));
};
