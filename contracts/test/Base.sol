// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {AttributionLog} from "../src/AttributionLog.sol";
import {RewardDistributor} from "../src/RewardDistributor.sol";
import {RewardToken} from "../src/RewardToken.sol";
import {IAttributionLog} from "../src/interfaces/IAttributionLog.sol";
import {IRewardDistributor} from "../src/interfaces/IRewardDistributor.sol";
import {RewardTree} from "./RewardTree.sol";
import {VM} from "./Vm.sol";

/// @dev Assertions, people, and the registration of logs.
abstract contract Base {
    bytes32 internal constant REGISTRATION_TYPE_HASH =
        keccak256("Registration(bytes32 logId,address owner,address submitter,address payee)");

    function assertEq(bytes32 got, bytes32 expected) internal pure {
        require(
            got == expected, string.concat("differs: ", VM.toString(uint256(got)), " ", VM.toString(uint256(expected)))
        );
    }

    function assertEq(uint256 got, uint256 expected) internal pure {
        require(got == expected, string.concat("differs: ", VM.toString(got), " ", VM.toString(expected)));
    }

    function assertEq(address got, address expected) internal pure {
        assertEq(uint160(got), uint160(expected));
    }

    function assertTrue(bool holds) internal pure {
        require(holds, "does not hold");
    }

    function bound(uint256 value, uint256 most) internal pure returns (uint256) {
        return value % (most + 1);
    }

    function keyOf(string memory name) internal pure returns (uint256) {
        return uint256(keccak256(bytes(name)));
    }

    function person(string memory name) internal pure returns (address) {
        return VM.addr(keyOf(name));
    }

    function signed(uint256 key, bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = VM.sign(key, digest);
        return abi.encodePacked(r, s, v);
    }

    function domainSeparator(string memory name, address verifier) internal view returns (bytes32) {
        bytes32 typeHash =
            keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");
        return keccak256(abi.encode(typeHash, keccak256(bytes(name)), keccak256("1"), block.chainid, verifier));
    }

    function initOf(string memory name) internal pure returns (IAttributionLog.LogInit memory) {
        return IAttributionLog.LogInit({
            originHash: keccak256(bytes(name)),
            signer: person(string.concat(name, " signer")),
            checkpointKey: bytes32(uint256(1)),
            nonce: bytes32(uint256(2)),
            predecessor: bytes32(0)
        });
    }

    function registration(IAttributionLog log, bytes32 logId, address owner, address submitter, address payee)
        internal
        view
        returns (bytes32)
    {
        bytes32 structHash = keccak256(abi.encode(REGISTRATION_TYPE_HASH, logId, owner, submitter, payee));
        return keccak256(abi.encodePacked(hex"1901", domainSeparator("OpenLoRA Log", address(log)), structHash));
    }

    /// @dev A log of this name, with owner, submitter and payee named after it.
    function register(IAttributionLog log, string memory name) internal returns (bytes32 logId) {
        IAttributionLog.LogInit memory init = initOf(name);
        logId = log.logIdOf(init);
        address owner = person(string.concat(name, " owner"));
        address submitter = person(string.concat(name, " submitter"));
        address payee = person(string.concat(name, " payee"));
        bytes memory signature =
            signed(keyOf(string.concat(name, " signer")), registration(log, logId, owner, submitter, payee));
        VM.prank(owner);
        log.registerLog(init, submitter, payee, signature);
    }

    function anchor(IAttributionLog log, bytes32 logId, uint64 size) internal {
        (uint64 previousSize, bytes32 previousRoot, address submitter) = log.headOf(logId);
        VM.prank(submitter);
        log.anchor(logId, previousSize, previousRoot, size, keccak256(abi.encode(logId, size)));
    }
}

/// @dev A distributor with two logs that hold deposits and anchored receipts.
abstract contract RewardsBase is Base {
    uint64 internal constant DELAY = 1 days;
    uint128 internal constant CAP = 1000;
    uint256 internal constant DEPOSIT = 5000;

    AttributionLog internal log;
    RewardToken internal token;
    RewardDistributor internal rewards;
    bytes32 internal logA; // the lower of the two ids
    bytes32 internal logB;

    address internal admin = person("admin");
    address internal publisher = person("publisher");
    address internal guardian = person("guardian");
    address internal payer = person("payer");
    address internal alice = person("alice");
    address internal bob = person("bob");

    function arrange() internal {
        VM.warp(1_800_000_000);
        log = new AttributionLog();
        token = new RewardToken(address(this));
        rewards = newDistributor(IERC20(token), log, 2);
        bytes32 one = register(log, "one");
        bytes32 other = register(log, "other");
        (logA, logB) = one < other ? (one, other) : (other, one);
        fund(logA, DEPOSIT);
        fund(logB, DEPOSIT);
        anchor(log, logA, 100);
        anchor(log, logB, 100);
    }

    function newDistributor(IERC20 token_, IAttributionLog log_, uint8 threshold)
        internal
        returns (RewardDistributor made)
    {
        made = new RewardDistributor(token_, log_, admin, DELAY, CAP, threshold);
        VM.startPrank(admin);
        made.grantRole(made.PUBLISHER_ROLE(), publisher);
        made.grantRole(made.GUARDIAN_ROLE(), guardian);
        for (uint256 i = 0; i < 3; ++i) {
            made.grantRole(made.ATTESTOR_ROLE(), attestor(i));
        }
        VM.stopPrank();
    }

    function attestor(uint256 number) internal pure returns (address) {
        return VM.addr(attestorKey(number));
    }

    /// @dev Keys of attestors, ascending by address.
    function attestorKey(uint256 number) internal pure returns (uint256) {
        uint256[3] memory keys = [keyOf("attestor 1"), keyOf("attestor 2"), keyOf("attestor 3")];
        for (uint256 i = 0; i < 2; ++i) {
            for (uint256 j = i + 1; j < 3; ++j) {
                if (VM.addr(keys[j]) < VM.addr(keys[i])) (keys[i], keys[j]) = (keys[j], keys[i]);
            }
        }
        return keys[number];
    }

    function fund(bytes32 logId, uint256 amount) internal {
        token.mint(payer, amount);
        VM.startPrank(payer);
        token.approve(address(rewards), amount);
        rewards.deposit(logId, amount);
        VM.stopPrank();
    }

    function allocation(bytes32 logId, uint64 from, uint64 to, uint256 amount)
        internal
        pure
        returns (IRewardDistributor.Allocation memory)
    {
        return IRewardDistributor.Allocation({logId: logId, from: from, to: to, amount: amount});
    }

    function only(bytes32 logId, uint64 from, uint64 to, uint256 amount)
        internal
        pure
        returns (IRewardDistributor.Allocation[] memory allocations)
    {
        allocations = new IRewardDistributor.Allocation[](1);
        allocations[0] = allocation(logId, from, to, amount);
    }

    function both(IRewardDistributor.Allocation memory one, IRewardDistributor.Allocation memory other)
        internal
        pure
        returns (IRewardDistributor.Allocation[] memory allocations)
    {
        allocations = new IRewardDistributor.Allocation[](2);
        allocations[0] = one;
        allocations[1] = other;
    }

    /// @dev Signatures of the first `count` attestors over the pending proposal.
    function attestations(uint256 count) internal view returns (bytes[] memory signatures) {
        (bytes32 digest,) = rewards.pending();
        signatures = new bytes[](count);
        for (uint256 i = 0; i < count; ++i) {
            signatures[i] = signed(attestorKey(i), digest);
        }
    }

    function propose(bytes32 root, uint256 total, IRewardDistributor.Allocation[] memory allocations) internal {
        VM.prank(publisher);
        rewards.propose(root, total, allocations);
    }

    function settle(bytes32 root, IRewardDistributor.Allocation[] memory allocations) internal {
        (uint256 total,,) = rewards.totals();
        for (uint256 i = 0; i < allocations.length; ++i) {
            total += allocations[i].amount;
        }
        propose(root, total, allocations);
        skip(DELAY);
        rewards.accept(rewards.epoch(), root, total, allocations, attestations(2));
    }

    function skip(uint256 seconds_) internal {
        VM.warp(block.timestamp + seconds_);
    }

    /// @dev The leaves of alice and bob.
    function leavesOf(uint256 aliceAmount, uint256 bobAmount) internal view returns (bytes32[] memory leaves) {
        leaves = new bytes32[](2);
        leaves[0] = RewardTree.leafOf(address(rewards), alice, aliceAmount);
        leaves[1] = RewardTree.leafOf(address(rewards), bob, bobAmount);
    }

    function rootOf(uint256 aliceAmount, uint256 bobAmount) internal view returns (bytes32) {
        return RewardTree.rootOf(leavesOf(aliceAmount, bobAmount));
    }

    /// @dev The proof of alice's (0) or bob's (1) leaf.
    function proofOf(uint256 aliceAmount, uint256 bobAmount, uint256 place) internal view returns (bytes32[] memory) {
        return RewardTree.proofOf(leavesOf(aliceAmount, bobAmount), place);
    }
}
