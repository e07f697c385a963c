"""Which molecules the embedded model learns from, and which it never sees."""

# ruff: noqa: E501, SIM905  (lists of names read best as words)

from __future__ import annotations

#: SMILES whose frames go into training (a few of them are held back as single frames)
TRAINING: tuple[str, ...] = tuple(
    """
    [H][H] N#N [C-]#[O+] O=C=O O OO N C NN NO C#N [O-][N+]#N
    CC C=C C#C CCC CC=C CC#C C=C=C C1CC1 C1=CC1 CCCC CC(C)C CC=CC CC(C)=C CCC=C CC#CC CCC#C C=CC=C C=CC#C C1CCC1 C1=CCC1 CC1CC1
    CCCCC CC(C)(C)C CCC(C)C C1CCCC1 C1=CCCC1 C1=CC=CC1 CC=C(C)C C=CCC=C CCCCCC C1CCCCC1 C1=CCCCC1 C1=CCC=CC1 c1ccccc1 Cc1ccccc1
    C=Cc1ccccc1 C#Cc1ccccc1 CCCCCCC
    CO CCO CCCO CC(C)O CC(C)(C)O CCCCO C=CO C=CCO C#CCO OCCO OCC(O)CO OCCCO OC1CC1 Oc1ccccc1 Oc1ccccc1O OCc1ccccc1
    COC CCOC CCOCC COCO COCCO COC=C C1CO1 CC1CO1 C1COC1 C1CCOC1 C1COCO1 C1COCCO1 c1ccoc1 COc1ccccc1 COCOC COOC COO
    C=O CC=O CCC=O CC(C)=O CCC(C)=O C=CC=O C#CC=O CC=CC=O O=CC=O CC(=O)C=O CC(=O)C(C)=O O=C1CCC1 O=C1CCCC1 C=C=O O=Cc1ccccc1 OCC=O
    CC(=O)CC(C)=O CC(=O)C=C(C)O O=CC=CO CC(=O)CO
    O=CO CC(=O)O CCC(=O)O CC(C)C(=O)O C=CC(=O)O OCC(=O)O O=CC(=O)O OC(=O)C(=O)O OC(=O)CC(=O)O COC=O COC(C)=O CCOC=O CCOC(C)=O O=C1CCO1 O=C1CCCO1
    COC(=O)C=C CC(=O)OC(C)=O OC(=O)O COC(=O)OC O=C1OCCO1 OC(=O)C#C O=C1C=CC(=O)O1
    CN CCN CNC CN(C)C CCNC CCCN CC(C)N C=CCN NCCN NCCO C1CN1 C1CNC1 C1CCNC1 C1COCCN1 C1CNCCN1 Nc1ccccc1 CN1CC1 CONC NOC CNN C=CN
    C=N CC=N CN=C CC=NC CC(C)=N CC=NO C=NO NC=N CC(N)=N NC(N)=N C=NN N=N CN=NC
    CC#N CCC#N C=CC#N N#CC#N N#CCC#N OCC#N NCC#N N#Cc1ccccc1 C#CC#N NC#N [C-]#[N+]C N=C=O CN=C=O N#CCCC#N CC(=O)C#N
    NC=O CNC=O CN(C)C=O CC(N)=O CNC(C)=O CCC(N)=O NC(N)=O CNC(N)=O NC(=O)C=O NC(=O)C(N)=O NC(=O)CO NCC(=O)O CC(N)C(=O)O NCC=O NC(=O)O COC(N)=O
    C=CC(N)=O O=C1CCN1 O=C1CCCN1 O=CNC=O NCC(N)=O NNC=O ONC=O
    c1ccncc1 c1cncnc1 c1ccnnc1 c1cnccn1 c1cc[nH]c1 c1c[nH]cn1 c1cn[nH]c1 c1cocn1 c1ccon1 c1nc[nH]n1 Cc1ccccn1 Cc1c[nH]cn1 Nc1ccccn1 Oc1ccccn1 O=c1cccc[nH]1
    Cc1ccco1 Cn1cccc1 O=Cc1ccco1 O=c1cc[nH]c(=O)[nH]1 Nc1cc[nH]c(=O)n1
    C[N+](=O)[O-] CC[N+](=O)[O-] CON=O O[N+](=O)[O-] O=[N+]([O-])c1ccccc1 [N-]=[N+]=C CN=[N+]=[N-]
    """.split()
)

#: SMILES never seen in training: no frame of theirs, alone or in a pair
HELD_OUT: tuple[str, ...] = tuple(
    """
    CC(C)C=C CC1CCC1 Cc1ccc(C)cc1 CC(O)CO CCOCO CC1COC1 Cc1ccccc1O CC(C)C=O O=C1C=CC=C1 CC(=O)CC=O CC(O)C(=O)O COCC(=O)O CCNCC CC1CN1 NCCCO CC(C)C#N COCC#N
    CCNC=O CC(=O)NC=O NC(=O)CC=O Cc1cccnc1 c1cncnn1 Cc1cnc[nH]1 CC(C)[N+](=O)[O-] CCC=NO
    """.split()
)

#: SMILES with three times the frames: the molecules of examples, and tautomers with a moving proton
EMPHASISED: frozenset[str] = frozenset(
    "O CO CCO COC C=O CC(=O)O O=CO NC=O CN CC#N CC(=O)CC(C)=O CC(=O)C=C(C)O O=CC=CO c1ccccc1 N C CC=O CC(C)=O CNC(C)=O".split()
)

#: closed-shell members of ASE's G2 set with H, C, N, O only (reference geometries, held out)
G2_NAMES: tuple[str, ...] = tuple(
    "H2 N2 H2O NH3 CH4 CO CO2 HCN H2CO H2O2 N2H4 N2O CH3OH CH3CH2OH CH3OCH3 CH3CHO OCHCHO CH3COOH HCOOH HCOOCH3 CH3CONH2 CH3CN "
    "CH3NO2 CH3ONO H2CCO CH3COCH3 H3CNH2 CH3CH2NH2 C2H2 C2H4 C2H6 C3H8 C4H4NH C4H4O C5H5N C6H6 butadiene isobutane isobutene "
    "cyclobutane cyclobutene bicyclobutane C3H4_C2v C3H4_C3v C3H4_D2d C3H6_Cs C3H6_D3h C3H9N CH2NHCH2 CH2OCH2 trans-butane 2-butyne".split()
)
